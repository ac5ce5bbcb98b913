"""Rotary positions of video tokens: a third of a head's channel pairs each for row, column, frame.

Pairs are neighbours, (x0, x1), (x2, x3)..., in the order rows, columns, frames; all three axes use
the same frequencies. Angles are pure functions of a token's place, so any part of a sequence,
dealt over whatever ranks, gets its own. The rotation is done in fp32 whatever the model's dtype.

Legend: S tokens of one rank, in its order; B micro-batch, N heads, H head dim, A channel pairs of
one axis (H = 6 A).
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_curr.models.norms import upcast
from megatron_curr.models.patches import Grid

LAST_FRAME = 479  # MUG-V's table of frames ends here; later ones count as the last


def rotary_frequencies(head_dim: int, base: float) -> Tensor:
    """Radians per row, column or frame of each pair of one axis, [A], fp64."""
    return base ** (-torch.arange(0, head_dim, 6, dtype=torch.float64) / head_dim)


def token_places(grid: Grid, positions_S: Tensor) -> Tensor:
    """(row, column, frame) of the tokens at these places in the sequence, [S, 3], int64.

    Frames count from 1: the start token stands in frame 0, first row and column, and the end token
    a frame after the last, in the last row and column. Padding goes with the end token.
    """
    patch_S = (positions_S - 1).clamp(0, grid.num_patches - 1)
    row_S = patch_S // grid.columns % grid.rows
    column_S = patch_S % grid.columns
    frame_S = patch_S // (grid.rows * grid.columns) + 1
    is_start_S, is_end_S = positions_S == 0, positions_S > grid.num_patches
    frame_S = torch.where(is_start_S, 0, frame_S + is_end_S.long()).clamp(max=LAST_FRAME)
    return torch.stack([row_S, column_S, frame_S], dim=1)


def rotation_table(
    grid: Grid, positions_S: Tensor, *, head_dim: int, base: float, dtype: torch.dtype
) -> Tensor:
    """Cosines and sines of the tokens' angles, [2, S, 1, 1, H / 2]."""
    places_S3 = token_places(grid, positions_S).to(torch.float64)
    frequencies_A = rotary_frequencies(head_dim, base).to(places_S3.device)
    angles = (places_S3[:, :, None] * frequencies_A).flatten(1)[:, None, None]
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)


def rotate(x_SBNH: Tensor, table: Tensor) -> Tensor:
    """Turn every pair of channels by its angle; the result has the dtype of ``x_SBNH``."""
    cosines, sines = table
    even, odd = upcast(x_SBNH).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1)
    return turned.flatten(-2).to(x_SBNH.dtype)
