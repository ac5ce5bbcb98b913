"""Where the units of a stretch begin on the token axis, counted from the stretch's own start.

A unit is what the order deals out: a sample of text, a lot of video. Samples of one sequence length
are all of one size; lots differ by the source and shape they hold, and how many of each lie before
a lot is the mixture's affair.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from megatron_curr.curriculum.mixture import Ints, MixtureOrder

ANSWERS_KEPT = 256


class Lattice(Protocol):
    """Both directions between units and tokens."""

    def tokens_before(self, unit: int) -> int:
        """Tokens of the first ``unit`` units."""

    def unit_from(self, tokens: int) -> int:
        """The first unit that begins at this token or after it."""


@dataclass(frozen=True, slots=True)
class EvenLattice:
    """Units of one size, without end."""

    unit_tokens: int

    def tokens_before(self, unit: int) -> int:
        """Tokens of the first ``unit`` units."""
        return unit * self.unit_tokens

    def unit_from(self, tokens: int) -> int:
        """The first unit that begins at this token or after it."""
        return -(-tokens // self.unit_tokens)


class LotLattice:
    """Lots of the cells of a mixture: as many as it deals out."""

    def __init__(self, mixture: MixtureOrder, lot_tokens: Ints) -> None:
        """``lot_tokens`` [num_cells] are those of one lot of each cell, 1 or more."""
        self.mixture = mixture
        self.lot_tokens = lot_tokens
        self._edges_tokens: Ints = mixture.edges @ lot_tokens  # of segments
        # A step is asked for by the loop and by the loader, and its end is the next one's start.
        self.tokens_before: Callable[[int], int] = lru_cache(ANSWERS_KEPT)(self._tokens_before)
        self.unit_from: Callable[[int], int] = lru_cache(ANSWERS_KEPT)(self._unit_from)

    def _tokens_before(self, unit: int) -> int:
        """Tokens of the first ``unit`` lots."""
        return int(self.mixture.counts(unit) @ self.lot_tokens)

    def _unit_from(self, tokens: int) -> int:
        """The first lot that begins at this token or after it; their number past the last."""
        # The segment first: one tree answers the rest of the search.
        segment = max(int(np.searchsorted(self._edges_tokens, tokens, side="left")) - 1, 0)
        if segment == len(self._edges_tokens) - 1:
            return self.mixture.num_samples
        low, high = self.mixture.starts[segment : segment + 2].tolist()
        first, last = self._edges_tokens[segment : segment + 2].tolist()
        # Lots are dealt evenly, so a straight line comes within a few of them.
        guess = max(low + (tokens - first) * (high - low) // (last - first), low)
        reach = 1
        while guess + reach < high and self.tokens_before(guess + reach) < tokens:
            guess, reach = guess + reach, 2 * reach
        high = min(guess + reach, high)
        reach = 1
        while guess > low and self.tokens_before(guess) >= tokens:
            high, guess, reach = guess, max(guess - reach, low), 2 * reach
        return bisect_left(range(high), tokens, lo=guess, hi=high, key=self.tokens_before)
