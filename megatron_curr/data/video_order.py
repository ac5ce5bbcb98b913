"""The order of clips: lot <-> (cell, epoch, clips), computed and never stored.

Which cell owns a lot is the mixture's affair (``curriculum.lots``). The clips of a cell, one bucket
of one source, are shuffled anew in every epoch; its n-th lot takes the next ``lot_samples`` of
them, so an epoch may end inside a lot. Cells share no clip: what holds for each holds for the
source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_curr.curriculum.lattice import LotLattice
from megatron_curr.curriculum.lots import Cell, VideoCurves, VideoPlanner
from megatron_curr.curriculum.mixture import Ints, MixtureOrder
from megatron_curr.curriculum.schedule import Schedule, Stretch
from megatron_curr.data.keyed import (
    Words,
    derive,
    identities,
    identity_keys,
    shuffle,
    stream_key,
    unshuffle,
)
from megatron_curr.data.lot_owners import LotOwners
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.video_schema import VideoRecipe

MAX_LOT_SAMPLES = 2**20  # so that a lot's position and a place in it make one 64-bit number


@dataclass(frozen=True, slots=True)
class Lot:
    """Samples that all data-parallel ranks work on at a time; arrays are [lot_samples]."""

    position: int
    cell: int  # index into VideoOrder.cells
    consumed_tokens: int  # before this lot
    stretch: Stretch
    epoch: Ints
    clip: Ints  # among the cell's clips, 0 to its number - 1

    @property
    def sample_ids(self) -> Ints:
        """One number a sample, different for every sample and visit of the run."""
        return self.position * MAX_LOT_SAMPLES + np.arange(len(self.clip), dtype=np.int64)

    @property
    def curves(self) -> VideoCurves:
        """The values of the lot's phase."""
        assert isinstance(self.stretch.curves, VideoCurves)
        return self.stretch.curves


class VideoOrder:
    """The lots of a run, both ways. Reads no data: it needs only the number of clips of each cell.

    ``num_clips`` is by cell name, ``source/bucket``. ``schedule`` is the given one, or a shorter
    one where a source with ``on_exhausted: stop`` runs out. Raises ``RecipeError`` where a cell in
    use has no clip, fewer than a lot takes, or would pass the source's ``max_epochs`` under
    ``on_exhausted: error``, or under ``reweight`` with no other source of its bucket.
    """

    def __init__(
        self,
        schedule: Schedule,
        num_clips: Mapping[str, int],
        *,
        recipe: VideoRecipe,
        planner: VideoPlanner,
    ) -> None:
        self.cells = planner.cells
        self.sources = planner.sources
        self.source_of = planner.source_of
        self.num_clips: Ints = np.array([num_clips[cell.name] for cell in self.cells], np.int64)
        self._lot_tokens = planner.lot_tokens
        self._settings = [recipe.data.sources[cell.source] for cell in self.cells]
        self._lot_samples = np.array([cell.lot_samples for cell in self.cells], np.int64)
        self._key = np.array(
            [stream_key(recipe.seed, f"order/{cell.name}") for cell in self.cells], np.uint64
        )
        self._identity_key = identity_keys([cell.name for cell in self.cells])
        self._bucket_of: Ints = np.array([planner.buckets.index(c.bucket) for c in self.cells])
        self._owners = [LotOwners(_mixture(s), self._bucket_of) for s in schedule.stretches]
        self._check_sizes(schedule)
        self.schedule = self._until_exhausted(schedule)
        self._check_sizes(self.schedule)  # a cell may have got another's share
        counts = self._counts(self.schedule)
        self._first_lot: Ints = np.cumsum([np.zeros_like(self.num_clips), *counts], axis=0)
        self._starts = np.array([stretch.start_position for stretch in self.schedule.stretches])

    @property
    def num_groups(self) -> int:
        """Losses are told apart by cell."""
        return len(self.cells)

    # -- position -> clips

    def lot(self, position: int) -> Lot:
        """The lot at this position."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        stretch = self.schedule.stretches[number]
        cell, rank = self._owners[number].owner(position - stretch.start_position)
        nth = (int(self._first_lot[number][cell]) + rank) * self.cells[cell].lot_samples
        nth_of_cell = nth + np.arange(self.cells[cell].lot_samples, dtype=np.int64)
        epoch, in_epoch = np.divmod(nth_of_cell, self.num_clips[cell])
        size = np.full_like(epoch, self.num_clips[cell])
        clip = shuffle(in_epoch, size, self._epoch_key(cell, epoch))
        return Lot(position, cell, stretch.consumed_at(position), stretch, epoch, clip)

    def identities(self, lot: Lot) -> Words:
        """[lot_samples]: which clip each sample is, and where in the run."""
        keys = np.full(len(lot.clip), self._identity_key[lot.cell])
        return identities(keys, lot.sample_ids, lot.clip)

    # -- clip -> positions

    def visits_of(self, cell: int, clip: int) -> Ints:
        """[num_visits, 2]: (position, place in the lot) of every visit of a clip, in order."""
        num_clips, size = int(self.num_clips[cell]), self.cells[cell].lot_samples
        num_lots = int(self._first_lot[-1][cell])
        epochs = np.arange(-(-num_lots * size // num_clips), dtype=np.int64)
        full = np.full_like(epochs, num_clips)
        nth = epochs * num_clips + unshuffle(
            np.full_like(epochs, clip), full, self._epoch_key(cell, epochs)
        )
        lots, place = np.divmod(nth[nth < num_lots * size], size)
        positions = np.empty_like(lots)
        number_of = np.searchsorted(self._first_lot[:, cell], lots, side="right") - 1
        for number in np.unique(number_of):
            here, stretch = number_of == number, self.schedule.stretches[number]
            ranks = lots[here] - self._first_lot[number][cell]
            positions[here] = stretch.start_position + self._owners[number].lots_of(cell, ranks)
        return np.stack([positions, place], axis=1)

    def _epoch_key(self, cell: int, epoch: Ints) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        return derive(np.full(len(epoch), self._key[cell]), epoch)

    # -- how much of each cell

    def lots_before(self, position: int) -> Ints:
        """[num_cells]: lots of each cell before this position."""
        number = max(int(np.searchsorted(self._starts, position, side="right")) - 1, 0)
        stretch = self.schedule.stretches[number]
        inside = min(position - stretch.start_position, stretch.num_samples)
        lots: Ints = self._first_lot[number] + self._owners[number].counts(inside)
        return lots

    def consumed_tokens(self, position: int) -> dict[str, int]:
        """Tokens of each source consumed before this position."""
        tokens = self.lots_before(position) * self._lot_tokens
        sums = np.bincount(self.source_of, tokens, len(self.sources)).astype(np.int64)
        return dict(zip(self.sources, sums.tolist(), strict=True))

    def bucket_tokens(self, position: int) -> dict[str, int]:
        """Tokens of each bucket consumed before this position."""
        tokens: dict[str, int] = {}
        for cell, count in zip(self.cells, self.lots_before(position).tolist(), strict=True):
            tokens[cell.bucket] = tokens.get(cell.bucket, 0) + count * cell.lot_tokens
        return tokens

    @property
    def num_tokens(self) -> Ints:
        """[num_sources]: latent patches of each source, in the buckets that are read of it."""
        sizes = self.num_clips * np.array([cell.sample_tokens for cell in self.cells])
        total: Ints = np.bincount(self.source_of, sizes, len(self.sources)).astype(np.int64)
        return total

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over each source before this position, in consumed tokens over its size."""
        consumed = self.consumed_tokens(position)
        sizes = dict(zip(self.sources, self.num_tokens.tolist(), strict=True))
        return {name: tokens / sizes[name] for name, tokens in consumed.items()}

    # -- building

    def _counts(self, schedule: Schedule) -> list[Ints]:
        """[num_cells] lots of each stretch; there may be fewer than were planned."""
        stretches = zip(self._owners, schedule.stretches, strict=False)
        return [owners.counts(stretch.num_samples) for owners, stretch in stretches]

    def _check_sizes(self, schedule: Schedule) -> None:
        for number in np.flatnonzero(sum(self._counts(schedule))):
            cell, clips = self.cells[number], int(self.num_clips[number])
            place = f"data.sources.{cell.source}: bucket {cell.bucket!r}"
            if clips == 0:
                raise RecipeError(
                    f"{place} has no sample in its shards; take the bucket out of the source, or "
                    f"preprocess clips that fit it"
                )
            if clips < cell.lot_samples:
                raise RecipeError(
                    f"{place} has {clips} samples, fewer than the {cell.lot_samples} of one lot, "
                    f"which would hold some of them twice; set data.buckets.{cell.bucket}."
                    f"batch_samples to {clips} or less, or add clips"
                )
            if cell.lot_samples > MAX_LOT_SAMPLES:
                raise RecipeError(
                    f"data.buckets.{cell.bucket}.batch_samples={cell.lot_samples}: a lot holds at "
                    f"most {MAX_LOT_SAMPLES} samples"
                )

    def _until_exhausted(self, schedule: Schedule) -> Schedule:
        """Deal what used-up cells leave to others.

        The schedule, over at the last whole step before a source that stops it runs out.
        """
        most = np.array([setting.max_epochs for setting in self._settings])
        most_samples = np.minimum(most * self.num_clips, 2.0**62).astype(np.int64)
        left: Ints = most_samples // self._lot_samples
        for owners, stretch in zip(self._owners, schedule.stretches, strict=True):
            while found := self._first_over(owners, stretch, left):
                lot, cell = found
                ending = self._settings[cell].on_exhausted
                if ending == "reweight" and owners.use_up(cell, lot):
                    continue
                at = stretch.consumed_at(stretch.start_position + lot)
                end = schedule.step_start(at) if ending == "stop" else 0
                if end == 0:
                    raise RecipeError(self._exhausted_message(cell, stretch))
                return schedule.ended_at(end)
            left = left - owners.counts(stretch.num_samples)
        return schedule

    def _first_over(
        self, owners: LotOwners, stretch: Stretch, left: Ints
    ) -> tuple[int, int] | None:
        """(lot of the stretch, cell) where a cell first gets a lot that it no longer has."""
        over = np.flatnonzero(owners.counts(stretch.num_samples) > left).tolist()
        for cell in over:
            if self._settings[cell].on_exhausted == "error":
                raise RecipeError(self._exhausted_message(cell, stretch))
        return min(((int(owners.lots_of(c, left[[c]])[0]), c) for c in over), default=None)

    def _exhausted_message(self, number: int, stretch: Stretch) -> str:
        cell: Cell = self.cells[number]
        setting = self._settings[number]
        remedy = "stop or reweight"
        found = f"it holds {self.num_clips[number]:,} samples"
        if setting.on_exhausted == "reweight":
            remedy = "stop"
            found += ", and no other source has weight there for a bucket of that name"
        return (
            f"data.sources.{cell.source}: bucket {cell.bucket!r} would be read more than "
            f"max_epochs={setting.max_epochs:g} times by the end of phase {stretch.phase!r}: "
            f"{found}. Lower its weight, add clips, raise max_epochs, or set on_exhausted to "
            f"{remedy}"
        )


def _mixture(stretch: Stretch) -> MixtureOrder:
    assert isinstance(stretch.lattice, LotLattice)
    return stretch.lattice.mixture
