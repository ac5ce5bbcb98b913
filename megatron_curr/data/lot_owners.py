"""Which cell owns each lot of a stretch, also after a cell is used up.

The mixture of the stretch says so. Where a cell is used up and leaves its share to others, the lots
of its bucket are dealt anew from there on, to the bucket's other cells by their weights. No lot
changes its shape, so the clock, the steps and the lots of other buckets stay as they were planned,
whatever the shards hold.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from megatron_curr.curriculum.mixture import Ints, MixtureOrder, Segment, without


@dataclass(frozen=True, slots=True)
class _Deal:
    """The lots of one bucket from the ``first``-th of the stretch on, dealt anew."""

    first: int
    segments: list[Segment]
    mixture: MixtureOrder
    before: Ints  # [num_cells] lots of each of the bucket's cells, earlier in the stretch


class LotOwners:
    """Lot of a stretch <-> (cell, rank): both directions, and counts. Lots are counted from 0.

    ``bucket_of`` [num_cells]. Ranks count a cell's lots from the start of the stretch.
    """

    def __init__(self, mixture: MixtureOrder, bucket_of: Ints) -> None:
        self._mixture = mixture
        self._bucket_of = bucket_of
        self._deals: dict[int, list[_Deal]] = {}  # by bucket, each from its first lot on

    def owner(self, lot: int) -> tuple[int, int]:
        """(cell, rank) of a lot."""
        cell, rank = (int(found[0]) for found in self._mixture.pick(np.array([lot])))
        bucket = int(self._bucket_of[cell])
        if bucket not in self._deals:
            return cell, rank
        place = self._place(bucket, lot)
        deal = _last(self._deals[bucket], place)
        if deal is None:
            return cell, rank
        cell, rank = (int(found[0]) for found in deal.mixture.pick(np.array([place - deal.first])))
        return cell, int(deal.before[cell]) + rank

    def counts(self, lot: int) -> Ints:
        """[num_cells]: lots of each cell before this one."""
        counts = self._mixture.counts(lot).copy()
        for bucket, deals in self._deals.items():
            mine = self._bucket_of == bucket
            place = int(counts[mine].sum())
            if deal := _last(deals, place):
                counts[mine] = (deal.before + deal.mixture.counts(place - deal.first))[mine]
        return counts

    def lots_of(self, cell: int, ranks: Ints) -> Ints:
        """The inverse of ``owner`` for one cell; ranks below its count."""
        bucket = int(self._bucket_of[cell])
        deals = self._deals.get(bucket, [])
        lots = np.empty_like(ranks)
        deal_of = np.searchsorted([deal.before[cell] for deal in deals], ranks, side="right") - 1
        for number in np.unique(deal_of).tolist():
            here = deal_of == number
            if number < 0:
                lots[here] = self._mixture.index_of(cell, ranks[here])
                continue
            deal = deals[number]
            places = deal.first + deal.mixture.index_of(cell, ranks[here] - deal.before[cell])
            lots[here] = [self._lot_at(bucket, place) for place in places.tolist()]
        return lots

    def use_up(self, cell: int, lot: int) -> bool:
        """Give the cell nothing from this lot on; False where its bucket has no other owner."""
        bucket = int(self._bucket_of[cell])
        mine = self._bucket_of == bucket
        before = np.where(mine, self.counts(lot), 0)
        first = int(before.sum())
        deals = self._deals.get(bucket, [])
        if deals:
            segments = without(deals[-1].segments, first - deals[-1].first, cell)
        else:
            segments = without(self._segments_of(mine), first, cell)
        if not segments:
            return False
        self._deals[bucket] = [*deals, _Deal(first, segments, MixtureOrder(segments), before)]
        return True

    def _segments_of(self, mine: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[Segment]:
        """The lots of some cells alone, with what weights they have beside each other."""
        segments = []
        sizes = np.diff(self._mixture.edges, axis=0)[:, mine].sum(axis=1)
        for size, segment in zip(sizes.tolist(), self._mixture.segments, strict=True):
            weights = np.where(mine, segment.weights, 0.0)
            if not weights.any():  # a lot that rounding has put off until here
                weights = np.where(mine, self._mixture.totals, 0).astype(np.float64)
            if size:
                segments.append(Segment(size, weights / math.fsum(weights)))
        return segments

    def _place(self, bucket: int, lot: int) -> int:
        """How many lots of the bucket lie before this one."""
        return int(self._mixture.counts(lot)[self._bucket_of == bucket].sum())

    def _lot_at(self, bucket: int, place: int) -> int:
        """The lot that has so many of its bucket before it."""
        every = range(self._mixture.num_samples)
        return bisect_left(every, place + 1, key=lambda lot: self._place(bucket, lot + 1))


def _last(deals: Sequence[_Deal], place: int) -> _Deal | None:
    """The deal that a place of its bucket belongs to; None before the first."""
    number = bisect_right(deals, place, key=attrgetter("first")) - 1
    return deals[number] if number >= 0 else None
