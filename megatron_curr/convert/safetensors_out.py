"""safetensors files written as they are read: header first, then rows, block by block.

No tensor is ever whole in memory. Files are written beside, flushed and renamed, so a file that
carries its name is whole, and a conversion that was killed goes on at the first that is missing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_curr.convert.family import Piece
from megatron_curr.convert.published import DTYPES, INDEX
from megatron_curr.convert.weights import Weights, written_dtype

BLOCK_BYTES = 32 << 20
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Written:
    """Sizes of what was written."""

    dtype: str
    num_parameters: int
    size_bytes: int


def write_safetensors(
    weights: Weights,
    pieces: Sequence[Piece],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_file_bytes: int,
    num_threads: int = 2,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write files of at most ``max_file_bytes`` (or one tensor), and their index.

    ``dtype`` None keeps what is stored. Files that are there already are kept. ``on_bytes`` is
    told of every block written.
    """
    groups = _split(weights, pieces, dtype, max_file_bytes)
    names = file_names(len(groups))
    with ThreadPoolExecutor(num_threads) as pool:
        jobs = [
            pool.submit(_write_file, weights, group, folder / name, dtype=dtype, on_bytes=on_bytes)
            for name, group in zip(names, groups, strict=True)
            if not (folder / name).is_file()
        ]
        try:
            for job in jobs:
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    count = sum(piece.num_values for piece in pieces)
    size = sum(_num_bytes(weights, piece, dtype) for piece in pieces)
    if len(groups) > 1:
        weight_map = {
            piece.published: name
            for name, group in zip(names, groups, strict=True)
            for piece in group
        }
        totals = {"total_size": size, "total_parameters": count}
        text = json.dumps({"metadata": totals, "weight_map": weight_map}, indent=2) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    written = written_dtype(weights, pieces[0].stored, dtype)
    return Written(str(written).removeprefix("torch."), count, size)


def file_names(count: int) -> list[str]:
    """What Hugging Face calls this many weight files."""
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _split(
    weights: Weights, pieces: Sequence[Piece], dtype: torch.dtype | None, most_bytes: int
) -> list[list[Piece]]:
    """Pieces grouped into files, in order."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        size = _num_bytes(weights, piece, dtype)
        if groups[-1] and filled + size > most_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += size
    return groups


def _num_bytes(weights: Weights, piece: Piece, dtype: torch.dtype | None) -> int:
    return piece.num_values * written_dtype(weights, piece.stored, dtype).itemsize


def _write_file(
    weights: Weights,
    pieces: Sequence[Piece],
    path: Path,
    *,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None],
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for piece in pieces:
        start, end = end, end + _num_bytes(weights, piece, dtype)
        header[piece.published] = {
            "dtype": _NAMES[written_dtype(weights, piece.stored, dtype)],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_suffix(".writing")
    with beside.open("wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.posix_fallocate(file.fileno(), 0, 8 + len(text) + end)
        for piece in pieces:
            to = written_dtype(weights, piece.stored, dtype)
            for block in bytes_of(weights, piece, to):
                on_bytes(write_all(file, block))
        os.fsync(file.fileno())
    beside.rename(path)


def bytes_of(weights: Weights, piece: Piece, dtype: torch.dtype) -> Iterator[memoryview]:
    """The piece's values in order, a few rows at a time."""
    row_bytes = weights.dtype(piece.stored).itemsize
    for length in piece.shape[1:]:
        row_bytes *= length
    at_once = max(BLOCK_BYTES // row_bytes, 1)
    for start, end in piece.rows:
        for first in range(start, end, at_once):
            block = weights.read(piece.stored, first, min(first + at_once, end))
            block = block.to(dtype).contiguous()
            yield memoryview(block.view(-1).view(torch.uint8).numpy())


def write_all(file: Any, data: memoryview) -> int:
    """Write every byte, to a file without a buffer; returns how many."""
    left = data
    while left:
        left = left[file.write(left) :]
    return len(data)
