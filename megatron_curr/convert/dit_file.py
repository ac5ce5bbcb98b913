"""Weights as the one file of torch that MUG-V is released in, written without holding them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_curr.convert.family import Piece
from megatron_curr.convert.files_out import bytes_block, weight_blocks, write_files
from megatron_curr.convert.saved_tensor import saved_layout
from megatron_curr.convert.weights import Weights, written_dtype


def write_dit_file(
    weights: Weights,
    pieces: Sequence[Piece],
    path: Path,
    *,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write a state dict of the pieces; returns the bytes of its values."""
    dtypes = [written_dtype(weights, piece.stored, dtype) for piece in pieces]
    layout = saved_layout(
        lambda: {
            piece.published: torch.empty(piece.shape, dtype=to)
            for piece, to in zip(pieces, dtypes, strict=True)
        }
    )
    values = iter(zip(pieces, dtypes, strict=True))
    blocks = []
    for part in layout:
        if isinstance(part, bytes):
            blocks.append(bytes_block(part))
        else:
            piece, to = next(values)
            assert part == piece.num_values * to.itemsize
            blocks += weight_blocks(weights, piece.stored, piece.rows, to)
    write_files(path.parent, {path.name: blocks}, on_bytes=on_bytes)
    return sum(part for part in layout if isinstance(part, int))
