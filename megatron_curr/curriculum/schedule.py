"""The schedule: everything that changes over a run, as a function of consumed tokens.

Phases are laid end to end on the token axis. Consecutive phases of one sequence length form a leg:
samples on both sides of a boundary inside a leg may share a step, so such a boundary is honoured to
the sample; where the length changes (and at the end) the leg is rounded to whole steps.

A schedule is compiled from a chain of curricula, each valid from a token on (``Edition``): the
first from 0, the others amendments. What an amendment cuts off keeps the order it was planned with,
so no sample before it moves.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_curr.curriculum.curves import Curve, Floats, Value, build_curve
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import DEFAULT_WEIGHT_DECAY, Curriculum, Phase, normalised


@dataclass(frozen=True, slots=True)
class Edition:
    """A curriculum and the token from which it is valid, on the same absolute token axis."""

    from_tokens: int
    curriculum: Curriculum


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Everything one optimizer step needs to know; a pure function of the clock."""

    step: int  # steps before this one
    consumed_tokens: int  # tokens before this step
    position: int  # the step's first sample
    num_samples: int  # global batch, all ranks
    seq_length: int
    phase: str  # of the step's first sample
    phase_index: int
    learning_rate: float
    weight_decay: float

    @property
    def step_tokens(self) -> int:
        """Tokens that this step consumes."""
        return self.num_samples * self.seq_length

    @property
    def next_consumed_tokens(self) -> int:
        """The clock after this step."""
        return self.consumed_tokens + self.step_tokens


@dataclass(frozen=True, slots=True)
class PhaseCurves:
    """One phase's values over tokens."""

    mixture: Curve[Floats]
    batch_tokens: Curve[float]
    learning_rate: Curve[float]
    weight_decay: Curve[float]


@dataclass(frozen=True, slots=True)
class Stretch:
    """The part of one phase, as one edition planned it, that a run goes through."""

    edition: int
    phase_index: int
    phase: str
    seq_length: int
    start_tokens: int
    start_position: int
    planned_samples: int  # as this edition laid it out
    num_samples: int  # what is left of that once a later edition has cut it
    curves: PhaseCurves

    @property
    def end_tokens(self) -> int:
        """The clock when this stretch is over."""
        return self.start_tokens + self.num_samples * self.seq_length

    @property
    def end_position(self) -> int:
        """The first sample after this stretch."""
        return self.start_position + self.num_samples


@dataclass(frozen=True, slots=True)
class StepRun:
    """Equal steps in a row."""

    start_tokens: int
    start_position: int
    start_step: int
    num_steps: int
    num_samples: int  # per step
    seq_length: int

    @property
    def end_tokens(self) -> int:
        """The clock after the last of them."""
        return self.start_tokens + self.num_steps * self.num_samples * self.seq_length


class Schedule:
    """The compiled curriculum of a run. ``at`` costs two bisections and keeps no state."""

    def __init__(
        self, sources: tuple[str, ...], planned: Sequence[Stretch], step_runs: Sequence[StepRun]
    ) -> None:
        self.sources = sources
        self.planned = tuple(planned)  # every stretch of every edition, cut ones too
        self.stretches = tuple(stretch for stretch in planned if stretch.num_samples)
        self.step_runs = tuple(step_runs)
        self._stretch_starts = [stretch.start_tokens for stretch in self.stretches]
        self._stretch_positions = [stretch.start_position for stretch in self.stretches]
        self._run_starts = [run.start_tokens for run in self.step_runs]

    @property
    def total_tokens(self) -> int:
        """The clock at the end."""
        return self.stretches[-1].end_tokens if self.stretches else 0

    @property
    def total_samples(self) -> int:
        """Samples in the whole run."""
        return self.stretches[-1].end_position if self.stretches else 0

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the whole run."""
        last = self.step_runs[-1:]
        return sum(run.start_step + run.num_steps for run in last)

    def stretch_at(self, consumed_tokens: int) -> Stretch:
        """The stretch that owns the sample starting at this token; the last one at the end."""
        return self.stretches[max(bisect_right(self._stretch_starts, consumed_tokens) - 1, 0)]

    def at(self, consumed_tokens: int) -> StepPlan:
        """What the step starting at ``consumed_tokens`` does.

        Raises ``ValueError`` where no step starts.
        """
        if not 0 <= consumed_tokens < self.total_tokens:
            raise ValueError(f"token {consumed_tokens} is outside the run of {self.total_tokens}")
        stretch = self.stretch_at(consumed_tokens)
        run = self.step_runs[bisect_right(self._run_starts, consumed_tokens) - 1]
        steps, inside = divmod(consumed_tokens - run.start_tokens, run.num_samples * run.seq_length)
        if inside:
            raise ValueError(f"no step starts at token {consumed_tokens}")
        return StepPlan(
            step=run.start_step + steps,
            consumed_tokens=consumed_tokens,
            position=run.start_position + steps * run.num_samples,
            num_samples=run.num_samples,
            seq_length=run.seq_length,
            phase=stretch.phase,
            phase_index=stretch.phase_index,
            learning_rate=stretch.curves.learning_rate.at(consumed_tokens),
            weight_decay=stretch.curves.weight_decay.at(consumed_tokens),
        )

    def step_start(self, consumed_tokens: int) -> int:
        """The clock at the start of the step that consumes this token; the end stays the end."""
        if consumed_tokens >= self.total_tokens:
            return self.total_tokens
        run = self.step_runs[max(bisect_right(self._run_starts, consumed_tokens) - 1, 0)]
        step_tokens = run.num_samples * run.seq_length
        return consumed_tokens - (consumed_tokens - run.start_tokens) % step_tokens

    def position_of(self, consumed_tokens: int) -> int:
        """The sample that contains this token."""
        stretch = self.stretch_at(consumed_tokens)
        inside = (consumed_tokens - stretch.start_tokens) // stretch.seq_length
        return stretch.start_position + inside

    def consumed_at(self, position: int) -> int:
        """Tokens consumed before this sample."""
        stretch = self.stretches[max(bisect_right(self._stretch_positions, position) - 1, 0)]
        return stretch.start_tokens + (position - stretch.start_position) * stretch.seq_length

    def weights_at(self, consumed_tokens: int) -> dict[str, float]:
        """The planned mixture, by source."""
        weights = self.stretch_at(consumed_tokens).curves.mixture.at(consumed_tokens)
        return dict(zip(self.sources, weights.tolist(), strict=True))

    def ended_at(self, consumed_tokens: int) -> Schedule:
        """The same schedule, over at this token, which must be a step's edge."""
        planned = [_cut(stretch, consumed_tokens) for stretch in self.planned]
        return Schedule(self.sources, planned, _cut_runs(self.step_runs, consumed_tokens))


def build_schedule(editions: Curriculum | Sequence[Edition]) -> Schedule:
    """Compile a curriculum, or a chain of them, into a schedule.

    Raises ``RecipeError`` where a phase has no sample, a curve has no start, or an amendment does
    not begin at a step's edge.
    """
    if isinstance(editions, Curriculum):
        editions = [Edition(0, editions)]
    sources = _sources(edition.curriculum for edition in editions)
    schedule = _compile(editions[0].curriculum, sources, edition=0, since=None)
    for number, edition in enumerate(editions[1:], start=1):
        if schedule.step_start(edition.from_tokens) != edition.from_tokens:
            raise RecipeError(
                f"no step starts at token {edition.from_tokens}: amend at a step's edge"
            )
        past = schedule.ended_at(edition.from_tokens)
        future = _compile(edition.curriculum, sources, edition=number, since=past)
        schedule = Schedule(
            sources, [*past.planned, *future.planned], [*past.step_runs, *future.step_runs]
        )
    return schedule


def _sources(curricula: Iterable[Curriculum]) -> tuple[str, ...]:
    """Every source named in a mixture, in order of first mention."""
    names: dict[str, None] = {}
    for curriculum in curricula:
        for phase in curriculum.phases:
            spec = phase.mixture
            for piece in spec if isinstance(spec, list) else [spec]:
                tables = [piece] if isinstance(piece, dict) else []
                if piece is not None and not isinstance(piece, dict):
                    tables = [piece.from_ or {}, piece.to]
                names.update(dict.fromkeys(name for table in tables for name in table))
    return tuple(names)


def _phase_curves(
    phase: Phase, held: PhaseCurves | None, sources: tuple[str, ...], start: int, end: int
) -> PhaseCurves:
    def weights(table: object) -> Floats:
        assert isinstance(table, dict)
        shares = normalised(table)
        return np.array([shares.get(name, 0.0) for name in sources])

    def number(value: object) -> float:
        assert isinstance(value, int | float)
        return value

    def curve(
        field: str, before: Value | None, value_of: Callable[[object], Value]
    ) -> Curve[Value]:
        spec = getattr(phase, field)
        try:
            return build_curve(spec, before, start_tokens=start, end_tokens=end, value_of=value_of)
        except ValueError as error:
            raise RecipeError(f"curriculum.phases[{phase.name}].{field}: {error}") from None

    decay = held.weight_decay.last if held else DEFAULT_WEIGHT_DECAY
    return PhaseCurves(
        mixture=curve("mixture", held.mixture.last if held else None, weights),
        batch_tokens=curve("global_batch_tokens", held.batch_tokens.last if held else None, number),
        learning_rate=curve("learning_rate", held.learning_rate.last if held else None, number),
        weight_decay=curve("weight_decay", decay, number),
    )


def _compile(
    curriculum: Curriculum, sources: tuple[str, ...], *, edition: int, since: Schedule | None
) -> Schedule:
    """Lay out one edition from where ``since`` ends (from 0 without it)."""
    layout = _Layout(sources, edition, since)
    start_tokens = layout.tokens
    edges = np.cumsum([0, *(phase.tokens for phase in curriculum.phases)]).tolist()
    held: PhaseCurves | None = None
    leg: list[tuple[int, Phase, PhaseCurves, int]] = []
    for index, phase in enumerate(curriculum.phases):
        held = _phase_curves(phase, held, sources, edges[index], edges[index + 1])
        if phase.tokens < phase.seq_length:
            raise RecipeError(
                f"curriculum.phases[{phase.name}].tokens={phase.tokens} leaves no room for one "
                f"sample of {phase.seq_length} tokens; make the phase longer"
            )
        if edges[index + 1] - start_tokens < phase.seq_length:
            continue  # over before this edition begins
        if leg and leg[-1][1].seq_length != phase.seq_length:
            layout.lay(leg)
            leg = []
        leg.append((index, phase, held, edges[index + 1]))
    if not leg:
        raise RecipeError(f"the amended curriculum ends before token {layout.tokens}")
    layout.lay(leg)
    return Schedule(sources, layout.planned, layout.step_runs)


class _Layout:
    """Lays legs end to end; remembers where the last one stopped."""

    def __init__(self, sources: tuple[str, ...], edition: int, since: Schedule | None) -> None:
        self.edition = edition
        self.tokens = since.total_tokens if since else 0
        self.position = since.total_samples if since else 0
        self.step = since.num_steps if since else 0
        self.planned: list[Stretch] = []
        self.step_runs: list[StepRun] = []

    def lay(self, leg: list[tuple[int, Phase, PhaseCurves, int]]) -> None:
        """Add phases of one sequence length, then round them to whole steps."""
        seq_length = leg[0][1].seq_length
        leg_tokens, leg_position = self.tokens, self.position
        start = leg_position
        for index, phase, curves, end_tokens in leg:
            end = max(leg_position + round((end_tokens - leg_tokens) / seq_length), start + 1)
            start_tokens = leg_tokens + (start - leg_position) * seq_length
            stretch = Stretch(
                edition=self.edition,
                phase_index=index,
                phase=phase.name,
                seq_length=seq_length,
                start_tokens=start_tokens,
                start_position=start,
                planned_samples=end - start,
                num_samples=end - start,
                curves=curves,
            )
            self.planned.append(stretch)
            self._reach(stretch, last=phase is leg[-1][1])
            start = end
        # The last phase takes up the rounding: it ends with the last step.
        tail = self.planned[-1]
        size = self.position - tail.start_position
        self.planned[-1] = replace(tail, planned_samples=size, num_samples=size)

    def _reach(self, stretch: Stretch, *, last: bool) -> None:
        """Add the stretch's steps: past its end inside a leg, to the nearest edge at the leg's."""
        batch, end_tokens = stretch.curves.batch_tokens, stretch.end_tokens
        while self.tokens < end_tokens:
            num_samples = int(batch.at(self.tokens)) // stretch.seq_length
            if num_samples < 1:
                raise RecipeError(
                    f"curriculum.phases[{stretch.phase}].global_batch_tokens="
                    f"{batch.at(self.tokens)} holds no sample of {stretch.seq_length} tokens"
                )
            step_tokens = num_samples * stretch.seq_length
            change = batch.next_change(self.tokens, end_tokens)
            num_steps = -(-(change - self.tokens) // step_tokens)
            past_end = self.tokens + num_steps * step_tokens - end_tokens
            # More than half of the last step lies past the end: leave it out, unless the phase
            # would then be empty.
            if last and 2 * past_end > step_tokens:
                num_steps -= 1
                if self.tokens + num_steps * step_tokens <= stretch.start_tokens:
                    num_steps += 1
                end_tokens = self.tokens
            if num_steps:
                self._add(num_steps, num_samples, stretch.seq_length)

    def _add(self, num_steps: int, num_samples: int, seq_length: int) -> None:
        run = StepRun(self.tokens, self.position, self.step, num_steps, num_samples, seq_length)
        self.step_runs.append(run)
        self.tokens = run.end_tokens
        self.position += num_steps * num_samples
        self.step += num_steps


def _cut(stretch: Stretch, end_tokens: int) -> Stretch:
    if stretch.end_tokens <= end_tokens:
        return stretch
    return replace(
        stretch, num_samples=max(end_tokens - stretch.start_tokens, 0) // stretch.seq_length
    )


def _cut_runs(step_runs: Sequence[StepRun], end_tokens: int) -> list[StepRun]:
    cut = []
    for run in step_runs:
        step_tokens = run.num_samples * run.seq_length
        num_steps = min(run.num_steps, max(end_tokens - run.start_tokens, 0) // step_tokens)
        if num_steps:
            cut.append(replace(run, num_steps=num_steps))
    return cut
