"""The curves of one phase, from its recipe entry and from where the phase before ended."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_curr.curriculum.curves import Curve, Floats, Value, build_curve
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import DEFAULT_WEIGHT_DECAY, RunPhase, normalised


@dataclass(frozen=True, slots=True)
class PhaseCurves:
    """One phase's values over tokens, whatever is trained."""

    mixture: Curve[Floats]  # [num_sources] shares of tokens
    batch_tokens: Curve[float]
    learning_rate: Curve[float]
    weight_decay: Curve[float]


class CurveReader:
    """Builds curves of one phase; ``held`` values are where the phase before ended.

    Raises ``RecipeError`` where a curve has neither an entry nor a value to hold.
    """

    def __init__(self, phase: RunPhase, *, start_tokens: int, end_tokens: int) -> None:
        self._phase = phase
        self._start_tokens = start_tokens
        self._end_tokens = end_tokens

    def number(self, field: str, held: Curve[float] | None) -> Curve[float]:
        """A curve of plain values."""
        return self._curve(field, held.last if held else None, _number)

    def shares(
        self, field: str, names: tuple[str, ...], held: Curve[Floats] | None
    ) -> Curve[Floats]:
        """A curve of weights, in the order of ``names``."""

        def weights(table: object) -> Floats:
            assert isinstance(table, dict)
            share_of = normalised(table)
            return np.array([share_of.get(name, 0.0) for name in names])

        return self._curve(field, held.last if held is not None else None, weights)

    def _curve(
        self, field: str, held: Value | None, value_of: Callable[[object], Value]
    ) -> Curve[Value]:
        try:
            return build_curve(
                getattr(self._phase, field),
                held,
                start_tokens=self._start_tokens,
                end_tokens=self._end_tokens,
                value_of=value_of,
            )
        except ValueError as error:
            raise RecipeError(f"curriculum.phases[{self._phase.name}].{field}: {error}") from None


def read_phase_curves(
    phase: RunPhase,
    held: PhaseCurves | None,
    sources: tuple[str, ...],
    *,
    start_tokens: int,
    end_tokens: int,
) -> PhaseCurves:
    """The curves that every phase has. Raises ``RecipeError`` for one without a start."""
    reader = CurveReader(phase, start_tokens=start_tokens, end_tokens=end_tokens)
    default_decay = build_curve(
        DEFAULT_WEIGHT_DECAY, None, start_tokens=0, end_tokens=0, value_of=_number
    )
    return PhaseCurves(
        mixture=reader.shares("mixture", sources, held.mixture if held else None),
        batch_tokens=reader.number("global_batch_tokens", held.batch_tokens if held else None),
        learning_rate=reader.number("learning_rate", held.learning_rate if held else None),
        weight_decay=reader.number("weight_decay", held.weight_decay if held else default_decay),
    )


def sources_of(curricula: Iterable[Sequence[RunPhase]]) -> tuple[str, ...]:
    """Every source named in a mixture, by name."""
    names: set[str] = set()
    for phases in curricula:
        for phase in phases:
            spec = phase.mixture
            for piece in spec if isinstance(spec, list) else [spec]:
                tables = [piece] if isinstance(piece, dict) else []
                if piece is not None and not isinstance(piece, dict):
                    tables = [piece.from_ or {}, piece.to]
                names.update(name for table in tables for name in table)
    return tuple(sorted(names))


def _number(value: object) -> float:
    assert isinstance(value, int | float)
    return value
