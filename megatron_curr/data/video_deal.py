"""How a lot is dealt to data-parallel ranks, and what is drawn for its samples. No torch.

Every rank takes as many samples of every lot, so micro-batches have one shape on all of them. Texts
differ in length: a lot's samples are dealt out from the shortest text to the longest, so that the
ranks' micro-batches are alike in that too and hold little padding. Which rank a sample falls to
changes nothing about it: all that is drawn for it is keyed by its place in the run.

Legend: B samples, T latent frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_curr.curriculum.curves import Floats
from megatron_curr.curriculum.lots import Cell
from megatron_curr.data.keyed import Ints
from megatron_curr.data.rectified_flow import (
    Bools,
    draw_dropped,
    draw_frame_masks,
    draw_timesteps,
    shift_factor,
)
from megatron_curr.data.video_order import Lot, VideoOrder
from megatron_curr.recipe.video_schema import VideoRecipe


class Texts(Protocol):
    """What dealing asks of shards."""

    @property
    def text_lengths(self) -> Ints:
        """Text tokens of every sample."""

    @property
    def empty_text_LE(self) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        """The features of the empty caption."""

    def clips_of(self, bucket: str) -> Ints:
        """The numbers of a bucket's samples."""


@dataclass(frozen=True, slots=True)
class Draws:
    """What is drawn for the samples of one lot; arrays are [lot_samples]."""

    sample_ids: Ints
    t: Floats
    mask_BT: Bools
    dropped: Bools

    def of(self, places: Ints) -> Draws:
        """Those of some samples."""
        return Draws(
            self.sample_ids[places], self.t[places], self.mask_BT[places], self.dropped[places]
        )


class LotDealer:
    """Draws for the samples of lots, and deals them to one of the ranks."""

    def __init__(
        self,
        recipe: VideoRecipe,
        order: VideoOrder,
        texts: Mapping[str, Texts],
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """``texts`` is by source name."""
        self._recipe = recipe
        self._texts = [texts[cell.source] for cell in order.cells]
        self._cells = order.cells
        self._dp_rank, self._dp_size = dp_rank, dp_size

    def draw(self, lot: Lot) -> Draws:
        """Timesteps, given frames and dropped captions; the same on every rank and layout."""
        objective, seed, ids = self._recipe.objective, self._recipe.seed, lot.sample_ids
        bucket = self._cells[lot.cell].bucket
        shape, curves = self._recipe.data.buckets[bucket], lot.curves
        frames = self._recipe.data.latent_shape(bucket)[0]
        shift = shift_factor(
            objective,
            pixels=shape.height * shape.width,
            latent_frames=frames,
            phase_shift=curves.timestep_shift.at(lot.consumed_tokens),
        )
        return Draws(
            sample_ids=ids,
            t=draw_timesteps(objective, seed, ids, shift=shift),
            mask_BT=draw_frame_masks(
                curves.tasks.at(lot.consumed_tokens), seed, ids, latent_frames=frames
            ),
            dropped=draw_dropped(objective, seed, ids),
        )

    def shares(self, lot: Lot, dropped: Bools) -> list[Ints]:
        """Places in the lot of each of this rank's micro-batches."""
        cell, texts = self._cells[lot.cell], self._texts[lot.cell]
        lengths = texts.text_lengths[texts.clips_of(cell.bucket)[lot.clip]]
        lengths = np.where(dropped, len(texts.empty_text_LE), lengths)
        rounds = np.argsort(lengths, kind="stable").reshape(-1, self._dp_size)
        rows = micro_batch_samples(self._recipe, cell)
        return np.array_split(rounds[:, self._dp_rank], -(-len(rounds) // rows))


def micro_batch_samples(recipe: VideoRecipe, cell: Cell) -> int:
    """The most samples of a cell in one micro-batch."""
    return max(recipe.parallel.micro_batch_tokens // cell.sample_tokens, 1)
