"""Batches of video for one data-parallel rank: what a step reads, and what is held out.

Legend: B samples of a micro-batch, C latent channels, T latent frames, Y rows, X columns, L text
tokens, E width of the text features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_curr.curriculum.lots import Cell
from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.data.keyed import Ints, stream_key
from megatron_curr.data.read_ahead import PREFETCHED_STEPS, AheadLoader
from megatron_curr.data.rectified_flow import MAX_TIMESTEP, Bools, add_noise, draw_noise
from megatron_curr.data.video_deal import Draws, LotDealer, micro_batch_samples
from megatron_curr.data.video_order import Lot, VideoOrder
from megatron_curr.data.video_shards import Clip, VideoShards
from megatron_curr.recipe.video_schema import VideoRecipe

# Held-out samples are measured at the middles of as many equal parts of 0 to 1.
HELDOUT_TIMESTEPS = (0.125, 0.375, 0.625, 0.875)


@dataclass(frozen=True, slots=True)
class VideoBatch:
    """One micro-batch on the CPU, whole samples; fp32 where nothing else is said."""

    latents_BCTYX: Tensor  # on their way to noise
    target_BCTYX: Tensor  # the velocity
    text_BLE: Tensor  # zeros beyond each text's end
    text_lengths_B: Tensor  # int64
    timesteps_B: Tensor  # 0 to 1000
    fps_B: Tensor
    frame_mask_BT: Tensor  # bool, True for frames with noise: those that carry loss
    loss_weight_B: Tensor
    counted_B: Tensor  # 1, or 0 for a sample that only fills the batch
    group_B: Tensor  # int64, what losses are told apart by: the cell; held out, the timestep too
    sample_ids_B: Tensor  # int64; see VideoOrder
    identities_B: Tensor  # the 64 bits of ``VideoOrder.identities``; 0 for held-out clips


class VideoLoader(AheadLoader[VideoBatch]):
    """Reads this rank's share of every lot of a step. ``shard_sets`` is by source name."""

    def __init__(
        self,
        recipe: VideoRecipe,
        schedule: Schedule,
        order: VideoOrder,
        shard_sets: Mapping[str, VideoShards],
        *,
        dp_rank: int,
        dp_size: int,
        prefetched_steps: int = PREFETCHED_STEPS,
    ) -> None:
        maker = LotReader(recipe, order, shard_sets, dp_rank=dp_rank, dp_size=dp_size)

        def read(plan: StepPlan) -> list[VideoBatch]:
            positions = range(plan.position, plan.position + plan.num_samples)
            return [batch for at in positions for batch in maker.read(order.lot(at))]

        super().__init__(read, schedule, prefetched_steps=prefetched_steps)


class LotReader:
    """Turns lots into this rank's micro-batches."""

    def __init__(
        self,
        recipe: VideoRecipe,
        order: VideoOrder,
        shard_sets: Mapping[str, VideoShards],
        *,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self._recipe = recipe
        self._shards = [shard_sets[cell.source] for cell in order.cells]
        self._order = order
        self._cells = order.cells
        self._dealer = LotDealer(recipe, order, shard_sets, dp_rank=dp_rank, dp_size=dp_size)

    def read(self, lot: Lot) -> Iterator[VideoBatch]:
        """This rank's micro-batches. Raises ``DataError`` for a sample that cannot be read."""
        cell, shards = self._cells[lot.cell], self._shards[lot.cell]
        draws = self._dealer.draw(lot)
        numbers = shards.clips_of(cell.bucket)[lot.clip]
        words = self._order.identities(lot).view(np.int64)
        is_clip = self._recipe.data.buckets[cell.bucket].num_frames > 1
        for share in self._dealer.shares(lot, draws.dropped):
            clips = [shards.read(int(number)) for number in numbers[share]]
            yield _make_batch(
                self._recipe,
                clips,
                texts=[
                    shards.empty_text_LE if draws.dropped[place] else clip.text_LE
                    for place, clip in zip(share.tolist(), clips, strict=True)
                ],
                draws=draws.of(share),
                weight=1.0 if is_clip else self._recipe.objective.image_loss_weight,
                group=np.full(len(share), lot.cell, np.int64),
                identities=words[share],
            )


def num_heldout(cell: Cell, heldout: Mapping[str, VideoShards]) -> int:
    """How many held-out samples there are of a cell."""
    shards = heldout.get(cell.source)
    bucket = shards.manifest.buckets.get(cell.bucket) if shards else None
    return bucket.num_samples if bucket else 0


def heldout_samples(recipe: VideoRecipe, cell: Cell, heldout: Mapping[str, VideoShards]) -> int:
    """How many of them are evaluated."""
    share = recipe.evaluation.tokens_per_source // len(recipe.data.sources[cell.source].buckets)
    most = max(share // cell.sample_tokens, 1)
    return min(most, num_heldout(cell, heldout))


def heldout_batches(
    recipe: VideoRecipe,
    cells: Sequence[Cell],
    heldout: Mapping[str, VideoShards],
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[VideoBatch]:
    """This rank's part of the held-out samples, each at every timestep of ``HELDOUT_TIMESTEPS``.

    Noise is that of the sample and never changes. Every rank gets as many batches of the same
    shapes: what is missing at the end is a sample that does not count.
    """
    for number, cell in enumerate(cells):
        count = heldout_samples(recipe, cell, heldout)
        if not count:
            continue
        shards = heldout[cell.source]
        clips = shards.clips_of(cell.bucket)
        frames = recipe.data.latent_shape(cell.bucket)[0]
        rows = micro_batch_samples(recipe, cell)
        own = np.arange(dp_rank, -(-count // dp_size) * dp_size, dp_size)
        for share in np.array_split(own, -(-len(own) // rows)):
            places = np.minimum(share, count - 1)
            read = [shards.read(int(clips[place])) for place in places]
            for step, t in enumerate(HELDOUT_TIMESTEPS):
                yield _make_batch(
                    recipe,
                    read,
                    texts=[clip.text_LE for clip in read],
                    draws=Draws(
                        stream_key(recipe.seed, f"heldout/{cell.name}") // 4 + places,
                        np.full(len(share), t),
                        np.ones((len(share), frames), np.bool_),
                        np.zeros(len(share), np.bool_),
                    ),
                    weight=1.0,
                    group=np.full(len(share), number * len(HELDOUT_TIMESTEPS) + step, np.int64),
                    counted=share < count,
                )


def _make_batch(
    recipe: VideoRecipe,
    clips: Sequence[Clip],
    *,
    texts: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.float32]]],
    draws: Draws,
    weight: float,
    group: Ints,
    counted: Bools | None = None,
    identities: Ints | None = None,
) -> VideoBatch:
    clean = np.stack([clip.latents_CTYX for clip in clips]).astype(np.float32, copy=False)
    noise = draw_noise(recipe.seed, draws.sample_ids, clean.shape[1:])
    noised = add_noise(recipe.objective, clean, noise, t_B=draws.t, mask_BT=draws.mask_BT)
    lengths = np.array([len(text) for text in texts], np.int64)
    text_BLE = np.zeros((len(texts), int(lengths.max()), texts[0].shape[1]), np.float32)
    for row, text in zip(text_BLE, texts, strict=True):
        row[: len(text)] = text
    num_samples = len(clips)
    counted = np.ones(num_samples, np.bool_) if counted is None else counted
    identities = np.zeros(num_samples, np.int64) if identities is None else identities
    return VideoBatch(
        latents_BCTYX=torch.from_numpy(noised.latents_BCTYX),
        target_BCTYX=torch.from_numpy(noised.target_BCTYX),
        text_BLE=torch.from_numpy(text_BLE),
        text_lengths_B=torch.from_numpy(lengths),
        timesteps_B=torch.from_numpy((draws.t * MAX_TIMESTEP).astype(np.float32)),
        fps_B=torch.tensor([clip.fps for clip in clips], dtype=torch.float32),
        frame_mask_BT=torch.from_numpy(draws.mask_BT),
        loss_weight_B=torch.full((num_samples,), weight),
        counted_B=torch.from_numpy(counted.astype(np.float32)),
        group_B=torch.from_numpy(group),
        sample_ids_B=torch.from_numpy(draws.sample_ids),
        identities_B=torch.from_numpy(identities),
    )
