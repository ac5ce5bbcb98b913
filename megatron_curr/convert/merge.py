"""Arithmetic on checkpoints: rows of several, combined as they are read.

Computed in fp32 and given back in the first source's dtype. Every method takes weights one by one;
nothing is whole in memory but what the reader asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megatron_curr.convert.source import Source
from megatron_curr.convert.weights import Weights
from megatron_curr.errors import CheckpointError, RecipeError

Method = Literal["average", "linear", "spherical", "residual"]
_COUNTS = {"linear": 2, "spherical": 2, "residual": 3}
_VALUES_AT_ONCE = 2 << 20  # of all sources together
_SAME_DIRECTION = 1e-4  # below this sine, spherical is linear up to rounding


class MergedWeights:
    """Several sources of one architecture, seen as one."""

    def __init__(
        self,
        sources: Sequence[Weights],
        combine: Callable[[str, list[Tensor]], Tensor],
    ) -> None:
        self._sources = sources
        self._combine = combine

    def __contains__(self, name: str) -> bool:
        return all(name in source for source in self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one weight; of a vocabulary, without what pads some of the sources."""
        shapes = [source.shape(name) for source in self._sources]
        return (min(shape[0] for shape in shapes), *shapes[0][1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one weight in the first source."""
        return self._sources[0].dtype(name)

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows [start, end) of one weight; of the sources, a few of them at a time."""
        height, *width = self.shape(name)
        end = height if end is None else end
        merged = torch.empty((end - start, *width), dtype=self.dtype(name))
        at_once = _rows_at_once(width, len(self._sources))
        for first in range(start, end, at_once):
            last = min(first + at_once, end)
            rows = [source.read(name, first, last).float() for source in self._sources]
            merged[first - start : last - start] = self._combine(name, rows)
        return merged


def merge(
    sources: Sequence[Source],
    *,
    method: Method,
    by: float | None = None,
    pieces_of: Callable[[Source], object] = lambda source: source.pieces(source.family()),
) -> Source:
    """One source out of several.

    ``average`` takes any number alike. ``linear`` and ``spherical`` go the part ``by`` of the way
    from the first to the second; spherical along the arc between them (Shoemake 1985), so that the
    norm of a weight does not shrink. ``residual`` adds ``by`` times (second - third) to the first:
    a tuned model less the base it was tuned from, onto another base. ``by`` is 1 by default.
    ``pieces_of`` raises for tensors that are not the model's. Raises ``RecipeError`` for another
    number of sources, or one given twice, and ``CheckpointError`` for sources of different models.
    """
    wanted = _COUNTS.get(method)
    if (wanted and len(sources) != wanted) or len(sources) < 2:
        raise RecipeError(
            f"--method {method}: takes {wanted or 'two or more'} sources, {len(sources)} are given"
        )
    if method == "average" and by is not None:
        raise RecipeError(
            f"--by {by:g}: an average takes all alike; leave it out, or use --method linear"
        )
    _check_different(sources)
    by = 1.0 if by is None else by
    first = sources[0]
    for source in sources:
        pieces_of(source)  # are its tensors what they should be?
    for other in sources[1:]:
        _check_same_model(first, other)
    weights = [source.weights for source in sources]
    combine = _method(method, weights, by=by)
    names = ", ".join(str(source.path) for source in sources)
    return replace(
        first,
        weights=MergedWeights(weights, combine),
        made_by=f"the {method} of {names}" + ("" if method == "average" else f" by {by}"),
        others=tuple(source.path for source in sources[1:]),
    )


def _method(
    method: Method, weights: Sequence[Weights], *, by: float
) -> Callable[[str, list[Tensor]], Tensor]:
    if method == "average":
        return lambda name, rows: torch.stack(rows).mean(dim=0)
    if method == "linear":
        return lambda name, rows: torch.lerp(rows[0], rows[1], by)
    if method == "residual":
        return lambda name, rows: rows[0] + by * (rows[1] - rows[2])
    return _Spherical(weights[0], weights[1], by=by)


class _Spherical:
    """Factors of the two sources, from the angle between them: one pass over a weight, kept."""

    def __init__(self, first: Weights, second: Weights, *, by: float) -> None:
        self._pair, self._by = (first, second), by
        self._factors: dict[str, tuple[float, float]] = {}

    def __call__(self, name: str, rows: list[Tensor]) -> Tensor:
        if name not in self._factors:  # two threads may both measure, to the same result
            self._factors[name] = self._measure(name)
        first, second = self._factors[name]
        return first * rows[0] + second * rows[1]

    def _measure(self, name: str) -> tuple[float, float]:
        dot = first_square = second_square = 0.0
        count = min(weights.shape(name)[0] for weights in self._pair)
        at_once = _rows_at_once(self._pair[0].shape(name)[1:], len(self._pair))
        for row in range(0, count, at_once):
            end = min(row + at_once, count)
            a, b = (weights.read(name, row, end).double() for weights in self._pair)
            dot += float((a * b).sum())
            first_square += float(a.square().sum())
            second_square += float(b.square().sum())
        length = math.sqrt(first_square * second_square)
        angle = math.acos(max(-1.0, min(1.0, dot / length))) if length else 0.0
        if math.sin(angle) < _SAME_DIRECTION:
            return 1 - self._by, self._by
        return (
            math.sin((1 - self._by) * angle) / math.sin(angle),
            math.sin(self._by * angle) / math.sin(angle),
        )


def _rows_at_once(width: Sequence[int], num_sources: int) -> int:
    return max(_VALUES_AT_ONCE // num_sources // math.prod(width), 1)


def _check_different(sources: Sequence[Source]) -> None:
    """A run and its newest checkpoint are the same, too: a source stands for what is read."""
    places = [source.path.resolve() for source in sources]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise RecipeError(
                f"{sources[number].path}: given twice; a model merged with itself is itself, so "
                "give another checkpoint in its place"
            )


def _check_same_model(first: Source, other: Source) -> None:
    neutral = {"preset", "make_vocab_size_divisible_by", "init_method_std", "vocab_size"}
    ours, theirs = (source.model.model_dump(exclude=neutral) for source in (first, other))
    ours["vocab_size"], theirs["vocab_size"] = first.vocab_size, other.vocab_size
    for name, value in ours.items():
        if theirs[name] != value:
            raise CheckpointError(
                f"{other.path}: {name} is {theirs[name]} and in {first.path} {value}; only "
                "checkpoints of one architecture are merged"
            )
