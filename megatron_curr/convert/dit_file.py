"""Weights as the one file of torch that MUG-V is released in, written without holding them.

``torch.save`` lays the file out and reserves the room, for tensors that have no memory; the values
then go to their places, a few rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_curr.convert.family import Piece
from megatron_curr.convert.safetensors_out import bytes_of, write_all, written_dtype
from megatron_curr.convert.weights import Weights


def write_dit_file(
    weights: Weights,
    pieces: Sequence[Piece],
    path: Path,
    *,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write a state dict of the pieces; returns the bytes of its values."""
    with FakeTensorMode():
        layout = {
            piece.published: torch.empty(
                piece.shape, dtype=written_dtype(weights, piece.stored, dtype)
            )
            for piece in pieces
        }
    checks = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)  # the values are not there yet to be summed
    try:
        with torch.serialization.skip_data(materialize_fake_tensors=True):
            torch.save(layout, path)
    finally:
        torch.serialization.set_crc32_options(checks)
    places = torch._C.PyTorchFileReader(str(path))
    total = 0
    with path.open("r+b", buffering=0) as file:
        for number, piece in enumerate(pieces):
            file.seek(places.get_record_offset(f"data/{number}"))
            to = written_dtype(weights, piece.stored, dtype)
            for block in bytes_of(weights, piece, to):
                total += write_all(file, block)
                on_bytes(len(block))
        os.fsync(file.fileno())
    return total
