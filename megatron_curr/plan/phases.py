"""The phases of a run in steps, and how often each of them reads each source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_curr.curriculum.lattice import LotLattice
from megatron_curr.curriculum.lots import Cell
from megatron_curr.curriculum.mixture import MixtureOrder, mixture_segments
from megatron_curr.curriculum.schedule import Schedule, Stretch
from megatron_curr.recipe.schema import Source
from megatron_curr.recipe.video_schema import VideoSource

MOST_EPOCHS = 4.0
"""Beyond this a token read again teaches clearly less than a new one: Muennighoff et al. 2023,
arXiv:2305.16264."""


@dataclass(frozen=True, slots=True)
class PhaseSteps:
    """One phase as the schedule lays it out."""

    name: str
    seq_length: int  # of every sample of text; of the longest clips
    tokens: int
    steps: int  # a step that two phases share counts for the one it begins in
    first_batch_tokens: int
    last_batch_tokens: int
    tokens_by_source: dict[str, int]  # for video by cell, ``source/bucket``

    @property
    def mean_batch_tokens(self) -> float:
        """Over its steps."""
        return self.tokens / max(self.steps, 1)


def phase_steps(schedule: Schedule, cells: Sequence[Cell] = ()) -> list[PhaseSteps]:
    """Every phase of the schedule, in order; ``cells`` are those of a video curriculum."""
    found = []
    starts = [_step_at(schedule, stretch.start_tokens) for stretch in schedule.stretches]
    for number, stretch in enumerate(schedule.stretches):
        next_step = starts[number + 1] if number + 1 < len(starts) else schedule.num_steps
        first = schedule.at(schedule.step_start(stretch.start_tokens))
        last = schedule.at(schedule.step_start(stretch.end_tokens - 1))
        by_source = _tokens_by_source(schedule, stretch, cells)
        longest = max((cell.sample_tokens for cell in cells if by_source[cell.name]), default=None)
        found.append(
            PhaseSteps(
                name=stretch.phase,
                seq_length=longest or stretch.seq_length,
                tokens=stretch.end_tokens - stretch.start_tokens,
                steps=next_step - starts[number],
                first_batch_tokens=first.step_tokens,
                last_batch_tokens=last.step_tokens,
                tokens_by_source=by_source,
            )
        )
    return found


def _step_at(schedule: Schedule, tokens: int) -> int:
    """The first step that begins at or after this token."""
    edge = schedule.step_start(tokens)
    step = schedule.at(edge).step
    return step if edge == tokens else step + 1


def _tokens_by_source(
    schedule: Schedule, stretch: Stretch, cells: Sequence[Cell]
) -> dict[str, int]:
    if isinstance(stretch.lattice, LotLattice):
        lots = stretch.lattice.mixture.counts(stretch.num_samples)
        names = [cell.name for cell in cells]
        return dict(zip(names, (lots * stretch.lattice.lot_tokens).tolist(), strict=True))
    segments = mixture_segments(
        stretch.curves.mixture,
        start_tokens=stretch.start_tokens,
        seq_length=stretch.seq_length,
        num_samples=stretch.planned_samples,
    )
    counts = MixtureOrder(segments).counts(stretch.num_samples) * stretch.seq_length
    return dict(zip(schedule.sources, counts.tolist(), strict=True))


def epochs_by_phase(
    phases: list[PhaseSteps], source_tokens: Mapping[str, int]
) -> dict[str, list[float]]:
    """For each source of known size, the passes over it since the start, at each phase's end."""
    epochs: dict[str, list[float]] = {}
    for name, size in source_tokens.items():
        read = 0
        for phase in phases:
            read += phase.tokens_by_source.get(name, 0)
            epochs.setdefault(name, []).append(read / size)
    return epochs


def epoch_warnings(
    phases: list[PhaseSteps],
    epochs: Mapping[str, list[float]],
    sources: Mapping[str, Source] | Mapping[str, VideoSource],
) -> tuple[list[str], list[str]]:
    """(what stops the run, what is only worth a look) of sources that are read often."""
    problems, warnings = [], []
    for name, by_phase in epochs.items():
        source = sources[name.partition("/")[0]]  # a cell of video has its source's limit
        most, final = source.max_epochs, by_phase[-1]
        limit = min(most, MOST_EPOCHS)
        if final <= limit:
            continue
        where = next(
            phase.name for phase, read in zip(phases, by_phase, strict=True) if read > limit
        )
        if final > most:
            ends = source.on_exhausted
            said = (
                f"data.sources.{name} would be read {final:.3g} times, past its max_epochs of "
                f"{most:g} in phase {where!r}"
            )
            if ends == "error":
                remedy = "lower its weight, add shards, raise max_epochs or set on_exhausted"
                problems.append(f"{said}; {remedy}")
            else:
                warnings.append(f"{said}: on_exhausted is {ends}")
        else:
            warnings.append(
                f"data.sources.{name} is read {final:.3g} times, {MOST_EPOCHS:g} are passed in "
                f"phase {where!r}: what is read again teaches less"
            )
    return problems, warnings
