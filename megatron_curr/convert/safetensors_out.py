"""safetensors files written as they are read: header first, then rows, block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_curr.convert.family import Piece
from megatron_curr.convert.files_out import Block, bytes_block, weight_blocks, write_files
from megatron_curr.convert.published import DTYPES, INDEX
from megatron_curr.convert.weights import Weights, written_dtype

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
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write files of at most ``max_file_bytes`` (or one tensor), and their index.

    ``dtype`` None keeps what is stored. Files that are there already are kept. ``on_bytes`` is
    told of every block written.
    """
    groups = _split(weights, pieces, dtype, max_file_bytes)
    names = file_names(len(groups))
    files = {
        name: _file_blocks(weights, group, dtype) for name, group in zip(names, groups, strict=True)
    }
    write_files(folder, files, on_bytes=on_bytes)
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


def _file_blocks(
    weights: Weights, pieces: Sequence[Piece], dtype: torch.dtype | None
) -> list[Block]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    blocks: list[Block] = []
    end = 0
    for piece in pieces:
        start, end = end, end + _num_bytes(weights, piece, dtype)
        to = written_dtype(weights, piece.stored, dtype)
        header[piece.published] = {
            "dtype": _NAMES[to],
            "shape": list(piece.shape),
            "data_offsets": [start, end],
        }
        blocks += weight_blocks(weights, piece.stored, piece.rows, to)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [bytes_block(len(text).to_bytes(8, "little") + text), *blocks]
