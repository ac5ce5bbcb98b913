"""How phases become units on the token axis: the part of a schedule that knows what is trained."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_curr.curriculum.lattice import EvenLattice, Lattice
from megatron_curr.curriculum.phase_curves import PhaseCurves, read_phase_curves, sources_of
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import Phase, RunPhase


@dataclass(frozen=True, slots=True)
class Span:
    """Where a phase goes: its tokens on the whole axis, and where its leg began."""

    start_tokens: int
    end_tokens: int
    leg_tokens: int


class Planner(Protocol):
    """Lays out the phases of one kind of run."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Every source that a mixture may name; a mixture's weights come in this order."""

    def curves(
        self, phase: RunPhase, held: PhaseCurves | None, *, start_tokens: int, end_tokens: int
    ) -> PhaseCurves:
        """The phase's curves."""

    def leg_of(self, phase: RunPhase) -> Hashable:
        """Consecutive phases of which this is equal may share a step."""

    def smallest_unit_tokens(self, phase: RunPhase, curves: PhaseCurves) -> int:
        """Tokens of the smallest unit that the phase may hold."""

    def lay(self, phase: RunPhase, curves: PhaseCurves, span: Span) -> tuple[Lattice, int]:
        """The phase's lattice, and its number of units."""

    def step_tokens(self, phase: str, lattice: Lattice, batch_tokens: int) -> int:
        """What a step of this batch takes. Raises ``RecipeError`` for a batch without a unit."""

    @property
    def ends_on_whole_steps(self) -> bool:
        """Whether a leg is made longer or shorter until it holds whole steps.

        Else its last step takes what is left, half a batch to one and a half.
        """


class TextPlanner:
    """Samples of one sequence length a phase."""

    ends_on_whole_steps = True

    def __init__(self, curricula: Sequence[Sequence[RunPhase]]) -> None:
        self.sources = sources_of(curricula)

    def curves(
        self, phase: RunPhase, held: PhaseCurves | None, *, start_tokens: int, end_tokens: int
    ) -> PhaseCurves:
        """The phase's curves."""
        return read_phase_curves(
            phase, held, self.sources, start_tokens=start_tokens, end_tokens=end_tokens
        )

    def leg_of(self, phase: RunPhase) -> Hashable:
        """Its sequence length."""
        assert isinstance(phase, Phase)
        return phase.seq_length

    def smallest_unit_tokens(self, phase: RunPhase, curves: PhaseCurves) -> int:
        """One sample. Raises ``RecipeError`` where not even that fits."""
        assert isinstance(phase, Phase)
        if phase.tokens < phase.seq_length:
            raise RecipeError(
                f"curriculum.phases[{phase.name}].tokens={phase.tokens} leaves no room for one "
                f"sample of {phase.seq_length} tokens; make the phase longer"
            )
        return phase.seq_length

    def lay(self, phase: RunPhase, curves: PhaseCurves, span: Span) -> tuple[Lattice, int]:
        """Samples up to the one nearest to the phase's end, counted from the leg's start."""
        assert isinstance(phase, Phase)
        length = phase.seq_length
        first = (span.start_tokens - span.leg_tokens) // length
        num_samples = round((span.end_tokens - span.leg_tokens) / length) - first
        return EvenLattice(length), max(num_samples, 1)

    def step_tokens(self, phase: str, lattice: Lattice, batch_tokens: int) -> int:
        """Whole samples."""
        assert isinstance(lattice, EvenLattice)
        if batch_tokens < lattice.unit_tokens:
            raise RecipeError(
                f"curriculum.phases[{phase}].global_batch_tokens={batch_tokens} holds no sample of "
                f"{lattice.unit_tokens} tokens"
            )
        return batch_tokens // lattice.unit_tokens * lattice.unit_tokens
