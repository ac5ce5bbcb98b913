"""Lots: the unit of a video curriculum, and how many of each kind a phase holds.

A lot is some samples of one cell, and a cell is one bucket of one source. Weights are shares of
tokens: a source has its weight of the mixture, and shares it out among its buckets by theirs. A
phase is cut into segments of constant weights, at the plateaus of both curves, and in a segment a
cell has lots in proportion to its tokens over those of one of its lots.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from megatron_curr.curriculum.curves import Curve, Floats, mean_progress
from megatron_curr.curriculum.lattice import Lattice, LotLattice
from megatron_curr.curriculum.mixture import (
    RAMP_PLATEAUS,
    Ints,
    MixtureOrder,
    Segment,
    split_segment,
)
from megatron_curr.curriculum.phase_curves import CurveReader, PhaseCurves, read_phase_curves
from megatron_curr.curriculum.planner import Span
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import RunPhase
from megatron_curr.recipe.schema import RunRecipe
from megatron_curr.recipe.video_phases import TASKS
from megatron_curr.recipe.video_schema import VideoRecipe


@dataclass(frozen=True, slots=True)
class Cell:
    """One bucket of one source."""

    source: str
    bucket: str
    lot_samples: int
    sample_tokens: int

    @property
    def name(self) -> str:
        """``source/bucket``."""
        return f"{self.source}/{self.bucket}"

    @property
    def lot_tokens(self) -> int:
        """Latent patches of one lot."""
        return self.lot_samples * self.sample_tokens


@dataclass(frozen=True, slots=True)
class VideoCurves(PhaseCurves):
    """One phase's values over tokens, for video."""

    bucket_names: tuple[str, ...]
    buckets: Curve[Floats]  # [num_buckets]
    tasks: Curve[Floats]  # [len(TASKS)]
    timestep_shift: Curve[float]


class VideoPlanner:
    """Lots of every cell of the recipe's data; all phases are one leg."""

    ends_on_whole_steps = False

    def __init__(self, recipe: VideoRecipe) -> None:
        self.sources = tuple(recipe.data.sources)
        self.buckets = tuple(recipe.data.buckets)
        self.cells = tuple(
            Cell(
                source=name,
                bucket=bucket,
                lot_samples=recipe.data.buckets[bucket].batch_samples,
                sample_tokens=recipe.sample_tokens(bucket),
            )
            for name, source in recipe.data.sources.items()
            for bucket in sorted(source.buckets)
        )
        self.lot_tokens: Ints = np.array([cell.lot_tokens for cell in self.cells], np.int64)
        self.source_of: Ints = np.array([self.sources.index(cell.source) for cell in self.cells])
        self._bucket_of = np.array([self.buckets.index(cell.bucket) for cell in self.cells])

    def curves(
        self, phase: RunPhase, held: PhaseCurves | None, *, start_tokens: int, end_tokens: int
    ) -> VideoCurves:
        """The phase's curves."""
        assert held is None or isinstance(held, VideoCurves)
        shared = read_phase_curves(
            phase, held, self.sources, start_tokens=start_tokens, end_tokens=end_tokens
        )
        reader = CurveReader(phase, start_tokens=start_tokens, end_tokens=end_tokens)
        return VideoCurves(
            mixture=shared.mixture,
            batch_tokens=shared.batch_tokens,
            learning_rate=shared.learning_rate,
            weight_decay=shared.weight_decay,
            bucket_names=self.buckets,
            buckets=reader.shares("buckets", self.buckets, held.buckets if held else None),
            tasks=reader.shares("tasks", TASKS, held.tasks if held else None),
            timestep_shift=reader.number("timestep_shift", held.timestep_shift if held else None),
        )

    def leg_of(self, phase: RunPhase) -> Hashable:
        """One for all: a step may hold lots of two phases."""
        return None

    def smallest_unit_tokens(self, phase: RunPhase, curves: PhaseCurves) -> int:
        """The smallest lot in use. Raises ``RecipeError`` where the largest does not fit."""
        used = self.cells_in(curves)
        self._check_sources(phase, curves, used)
        largest = self.cells[used[self.lot_tokens[used].argmax()]]
        if phase.tokens < largest.lot_tokens:
            raise RecipeError(
                f"curriculum.phases[{phase.name}].tokens={phase.tokens} leaves no room for one lot "
                f"of {largest.name}, {largest.lot_samples} samples of {largest.sample_tokens} "
                f"tokens; make the phase longer, or the bucket's batch_samples smaller"
            )
        return int(self.lot_tokens[used].min())

    def lay(self, phase: RunPhase, curves: PhaseCurves, span: Span) -> tuple[Lattice, int]:
        """Lots whose tokens come nearest to the phase's, segment by segment."""
        assert isinstance(curves, VideoCurves)
        segments: list[Segment] = []
        planned_lots, num_lots = 0.0, 0
        for start, end in pairwise(_plateau_edges(curves, span)):
            shares = self.cell_weights(curves, start, end) / self.lot_tokens
            planned_lots += (end - start) * math.fsum(shares)
            size = round(planned_lots) - num_lots
            num_lots += size
            segments += split_segment(size, shares / math.fsum(shares))
        if not segments:
            segments = [Segment(1, shares / math.fsum(shares))]
        mixture = MixtureOrder(segments)
        return LotLattice(mixture, self.lot_tokens), mixture.num_samples

    def step_tokens(self, phase: str, lattice: Lattice, batch_tokens: int) -> int:
        """The batch, which must hold the largest lot, so that no step is empty."""
        assert isinstance(lattice, LotLattice)
        used = np.flatnonzero(lattice.mixture.totals)
        largest = self.cells[used[self.lot_tokens[used].argmax()]]
        if batch_tokens < largest.lot_tokens:
            raise RecipeError(
                f"curriculum.phases[{phase}].global_batch_tokens={batch_tokens} holds no lot of "
                f"{largest.name}, {largest.lot_samples} samples of {largest.sample_tokens} tokens; "
                f"make it {largest.lot_tokens} or more, or the bucket's batch_samples smaller"
            )
        return batch_tokens

    def cells_in(self, curves: PhaseCurves) -> Ints:
        """Which cells have weight anywhere in a phase."""
        assert isinstance(curves, VideoCurves)
        sources, buckets = _largest(curves.mixture), _largest(curves.buckets)
        return np.flatnonzero((sources[self.source_of] > 0) & (buckets[self._bucket_of] > 0))

    def _check_sources(self, phase: RunPhase, curves: PhaseCurves, used: Ints) -> None:
        """Every source with weight must have a bucket with weight, or its share would be lost."""
        for number in np.flatnonzero(_largest(curves.mixture)):
            if number not in self.source_of[used]:
                name = self.sources[number]
                known = [cell.bucket for cell in self.cells if cell.source == name]
                raise RecipeError(
                    f"curriculum.phases[{phase.name}].buckets: {name!r} has weight in the mixture, "
                    f"but none of its buckets ({', '.join(known)}) has; give one of them weight, "
                    f"or take the source out of the mixture"
                )

    def cell_weights(self, curves: VideoCurves, start_tokens: int, end_tokens: int) -> Floats:
        """[num_cells] mean shares of tokens between two tokens, summing to 1.

        Where a ramp leaves a source no bucket for a while, its share goes to the others. Raises
        ``RecipeError`` where nothing has weight.
        """
        mixture = _mean(curves.mixture, start_tokens, end_tokens)
        buckets = _mean(curves.buckets, start_tokens, end_tokens)[self._bucket_of]
        of_source = np.bincount(self.source_of, buckets, len(self.sources))[self.source_of]
        inside = np.divide(buckets, of_source, out=np.zeros_like(buckets), where=of_source > 0)
        weights: Floats = mixture[self.source_of] * inside
        if not weights.any():
            raise RecipeError(
                f"curriculum: at token {start_tokens} no source of the mixture has a bucket with "
                f"weight; let the ramps of mixture and buckets overlap"
            )
        weights /= math.fsum(weights)
        return weights


def planner_of(recipe: RunRecipe) -> VideoPlanner | None:
    """What lays out a recipe's curriculum; None for text, which needs nothing but its phases."""
    return VideoPlanner(recipe) if isinstance(recipe, VideoRecipe) else None


def _plateau_edges(curves: VideoCurves, span: Span) -> Sequence[int]:
    """Where the weights move, in tokens, first and last token of the span included.

    The plateaus of a ramp are laid out from its own start: a stretch that begins inside it has the
    same ones.
    """
    end_tokens = max(span.end_tokens, span.start_tokens + 1)  # the phase before may end later
    edges = {span.start_tokens, end_tokens}
    for curve in (curves.mixture, curves.buckets):
        for ramp in curve.ramps:
            edges |= {ramp.start_tokens, ramp.end_tokens}
            if not ramp.constant and ramp.shape != "step":
                length = ramp.end_tokens - ramp.start_tokens
                edges |= {
                    ramp.start_tokens + length * number // RAMP_PLATEAUS
                    for number in range(1, RAMP_PLATEAUS)
                }
    return sorted(edge for edge in edges if span.start_tokens <= edge <= end_tokens)


def _largest(curve: Curve[Floats]) -> Floats:
    """The highest that each value gets."""
    ends = [end for ramp in curve.ramps for end in (ramp.first, ramp.last)]
    largest: Floats = np.max(np.stack(ends), axis=0)
    return largest


def _mean(curve: Curve[Floats], start_tokens: int, end_tokens: int) -> Floats:
    """Mean value between two tokens that no edge of a ramp lies between."""
    ramp = curve.ramp_at(start_tokens)
    if start_tokens < ramp.start_tokens:
        return ramp.first
    if start_tokens >= ramp.end_tokens or ramp.constant:
        return ramp.last
    length = ramp.end_tokens - ramp.start_tokens
    done = mean_progress(
        ramp.shape,
        (start_tokens - ramp.start_tokens) / length,
        (end_tokens - ramp.start_tokens) / length,
    )
    return ramp.first + (ramp.last - ramp.first) * done
