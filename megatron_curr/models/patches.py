"""Latent videos as sequences of patches, and the part of the sequence that a rank holds.

A sequence is a start token, the patches in the order frame, row, column, an end token, and padding
up to what the context and tensor ranks can share out evenly. Padding is seen by no token and
carries no loss, so it changes nothing.

Legend: B micro-batch, C channels, T latent frames, Y rows, X columns, S places of the sequence
(whole, or a context rank's in the names that say local), K numbers of one patch, ordered frame,
row, column, channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_curr.parallel.context_split import (
    gather_from_context_parallel,
    local_positions,
    split_for_context_parallel,
)
from megatron_curr.parallel.groups import Groups


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches of one sample along each axis."""

    frames: int
    rows: int
    columns: int

    @classmethod
    def of(cls, latent_shape: Sequence[int], patch: Sequence[int]) -> Grid:
        """The grid of latents [..., T, Y, X]; incomplete patches at the borders count."""
        return cls(
            *(-(-length // size) for length, size in zip(latent_shape[-3:], patch, strict=True))
        )

    @property
    def num_patches(self) -> int:
        return self.frames * self.rows * self.columns

    @property
    def num_tokens(self) -> int:
        """Patches, start and end token."""
        return self.num_patches + 2

    def padded_length(self, groups: Groups) -> int:
        """Places of the sequence: each tensor rank of each context rank holds as many."""
        two_chunks = 2 * groups.cp_size if groups.cp_size > 1 else 1
        multiple = math.lcm(two_chunks, groups.cp_size * groups.tp_size)
        return -(-self.num_tokens // multiple) * multiple


def held_positions(grid: Grid, groups: Groups) -> Tensor:
    """Places in the whole sequence that this context rank holds, in its order, int64."""
    return local_positions(
        grid.padded_length(groups), cp_rank=groups.cp_rank, cp_size=groups.cp_size
    ).to(groups.device)


def local_patches(x_BCTYX: Tensor, *, patch: Sequence[int], groups: Groups) -> Tensor:
    """This context rank's patches, [B, S local, K]: the model's input, and what it predicts.

    Zero where the place holds no patch, and beyond the border of ``x_BCTYX``.
    """
    frame, row, column = patch
    grid = Grid.of(x_BCTYX.shape, patch)
    sizes = (grid.frames * frame, grid.rows * row, grid.columns * column)
    beyond = [size - length for size, length in zip(sizes, x_BCTYX.shape[2:], strict=True)]
    x_BCTYX = F.pad(x_BCTYX, [0, beyond[2], 0, beyond[1], 0, beyond[0]])
    patches = (
        x_BCTYX.unflatten(4, (-1, column)).unflatten(3, (-1, row)).unflatten(2, (-1, frame))
    ).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return _local(patches.flatten(4).flatten(1, 3), grid, groups)


def local_frame_mask(frame_mask_BT: Tensor, *, grid: Grid, groups: Groups) -> Tensor:
    """The mask of each place's frame, [B, S local]; False where the place holds no patch."""
    per_frame_BT1 = frame_mask_BT[:, :, None]
    mask_BS = per_frame_BT1.expand(-1, -1, grid.rows * grid.columns).flatten(1)
    return _local(mask_BS, grid, groups)


def whole_video(
    patches_BSK: Tensor, *, latent_shape: Sequence[int], patch: Sequence[int], groups: Groups
) -> Tensor:
    """Inverse of ``local_patches``: [B, C, T, Y, X] on every rank, without gradient. Collective."""
    frame, row, column = patch
    grid = Grid.of(latent_shape, patch)
    whole_BSK = gather_from_context_parallel(patches_BSK.detach(), groups)
    patches = (
        whole_BSK[:, 1 : 1 + grid.num_patches]
        .unflatten(2, (frame, row, column, -1))
        .unflatten(1, (grid.frames, grid.rows, grid.columns))
    ).permute(0, 7, 1, 4, 2, 5, 3, 6)
    video_BCTYX = patches.flatten(6).flatten(4, 5).flatten(2, 3)
    frames, rows, columns = latent_shape[-3:]
    return video_BCTYX[:, :, :frames, :rows, :columns]


def _local(per_patch: Tensor, grid: Grid, groups: Groups) -> Tensor:
    """[B, patches, ...] laid out as the sequence, and this context rank's part of it."""
    behind = grid.padded_length(groups) - 1 - grid.num_patches
    per_place = F.pad(per_patch, [0, 0] * (per_patch.dim() - 2) + [1, behind])
    return split_for_context_parallel(per_place, groups)
