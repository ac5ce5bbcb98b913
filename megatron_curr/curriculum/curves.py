"""Values that change with consumed tokens: ramps laid end to end, evaluated without state."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_curr.recipe.phases import BatchPiece, MixturePiece, Piece, Shape

Floats = NDArray[np.float64]
Value = TypeVar("Value", float, Floats)
AnyPiece = Piece | BatchPiece | MixturePiece

# Digits kept of a ramp's progress. cos and sin differ in the last bit between C libraries; ranks on
# different machines must still agree on every batch size and every sample.
PROGRESS_DIGITS = 12


def progress(shape: Shape, done_frac: float) -> float:
    """How far a ramp has come, 0 to 1, after ``done_frac`` of its tokens."""
    done = min(max(done_frac, 0.0), 1.0)
    if shape == "linear":
        return done
    if shape == "cosine":
        return round((1.0 - math.cos(math.pi * done)) / 2.0, PROGRESS_DIGITS)
    return float(done >= 1.0)


def mean_progress(shape: Shape, start_frac: float, end_frac: float) -> float:
    """Mean of ``progress`` between two fractions of a ramp, in closed form."""
    if shape == "linear":
        return (start_frac + end_frac) / 2.0
    if shape == "cosine":
        swing = math.sin(math.pi * end_frac) - math.sin(math.pi * start_frac)
        mean = 0.5 - swing / (2.0 * math.pi * (end_frac - start_frac))
        return round(min(max(mean, 0.0), 1.0), PROGRESS_DIGITS)
    return 0.0


@dataclass(frozen=True, slots=True)
class Ramp(Generic[Value]):
    """From ``first`` at ``start_tokens`` to ``last`` at ``end_tokens``, and ``last`` ever after."""

    start_tokens: int
    end_tokens: int
    first: Value
    last: Value
    shape: Shape
    increment: int | None = None  # climb in whole increments of this many tokens

    @property
    def constant(self) -> bool:
        """True where the value never moves."""
        return self.start_tokens == self.end_tokens or bool(np.all(self.first == self.last))

    def at(self, seen_tokens: int) -> Value:
        """The value once ``seen_tokens`` have been consumed."""
        if seen_tokens >= self.end_tokens:
            return self.last
        if seen_tokens <= self.start_tokens:
            return self.first
        done = (seen_tokens - self.start_tokens) / (self.end_tokens - self.start_tokens)
        moved: Value = (self.last - self.first) * progress(self.shape, done)
        if self.increment is not None:
            moved = moved - np.fmod(moved, self.increment)
        return self.first + moved


@dataclass(frozen=True, slots=True)
class Curve(Generic[Value]):
    """Ramps laid end to end over one phase; the value holds between and after them."""

    ramps: tuple[Ramp[Value], ...]

    def at(self, seen_tokens: int) -> Value:
        """The value once ``seen_tokens`` have been consumed."""
        return self.ramp_at(seen_tokens).at(seen_tokens)

    @property
    def last(self) -> Value:
        """The value that the next phase inherits."""
        return self.ramps[-1].last

    def next_change(self, seen_tokens: int, limit_tokens: int) -> int:
        """First token after ``seen_tokens`` with another value, at most ``limit_tokens``.

        Ramps are monotone, so a bisection over whole tokens finds it.
        """
        here = self.at(seen_tokens)
        ends = [ramp.end_tokens for ramp in self.ramps] + [ramp.start_tokens for ramp in self.ramps]
        for edge in sorted({t for t in ends if seen_tokens < t < limit_tokens} | {limit_tokens}):
            if self.at(edge) == here:
                continue
            low, high = seen_tokens, edge
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self.at(middle) == here else (low, middle)
            return high
        return limit_tokens

    def ramp_at(self, seen_tokens: int) -> Ramp[Value]:
        """The ramp that this token lies in or after; the first one before all."""
        starts = [ramp.start_tokens for ramp in self.ramps]
        return self.ramps[max(bisect_right(starts, seen_tokens) - 1, 0)]


def build_curve(
    spec: object,
    held: Value | None,
    *,
    start_tokens: int,
    end_tokens: int,
    value_of: Callable[[object], Value],
) -> Curve[Value]:
    """The curve of one phase from its recipe entry.

    ``held`` is what the phase before ended on; ``value_of`` turns a recipe value into a ``Value``.
    Raises ``ValueError`` when there is neither an entry nor a value to hold.
    """
    if spec is None:
        if held is None:
            raise ValueError("no value given, and no earlier phase to take it from")
        return Curve((Ramp(start_tokens, start_tokens, held, held, "step"),))
    if not isinstance(spec, Piece | BatchPiece | MixturePiece | list):
        value = value_of(spec)
        return Curve((Ramp(start_tokens, start_tokens, value, value, "step"),))
    ramps: list[Ramp[Value]] = []
    at_tokens = start_tokens
    for piece in spec if isinstance(spec, list) else [spec]:
        first = held if piece.from_ is None else value_of(piece.from_)
        if first is None:
            raise ValueError("a ramp without 'from' needs an earlier phase to start at")
        piece_end = end_tokens if piece.over is None else min(at_tokens + piece.over, end_tokens)
        held = value_of(piece.to)
        increment = piece.increment if isinstance(piece, BatchPiece) else None
        ramps.append(Ramp(at_tokens, piece_end, first, held, piece.shape, increment))
        at_tokens = piece_end
    return Curve(tuple(ramps))
