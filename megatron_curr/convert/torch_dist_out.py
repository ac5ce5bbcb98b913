"""Weights as a ``torch_dist`` checkpoint, written without a process group or a model.

Every layer and every expert is one chunk, as megatron-core's own save makes them on one rank; its
loader cuts them for any layout. Where each lies is known before the first is written. Optimizer
state and ``_extra_state`` are not written.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_curr.convert.files_out import Block, bytes_block, weight_blocks, write_files
from megatron_curr.convert.saved_tensor import saved_layout
from megatron_curr.convert.stored import METADATA, stored_place
from megatron_curr.convert.weights import Weights, written_dtype
from megatron_curr.recipe.model import Model

CHUNK_FILE_BYTES = 10**9
_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class _Saved:
    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]
    dtype: torch.dtype
    place: _StorageInfo


def write_torch_dist(
    weights: Weights,
    names: Sequence[str],
    folder: Path,
    *,
    model: Model,
    dtype: torch.dtype | None,
    max_file_bytes: int = CHUNK_FILE_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the weights of these names, in files of at most this size (or one weight).

    Returns the bytes of all chunks. Files that are there already are kept.
    """
    every: list[_Saved] = []
    files: dict[str, list[Block]] = {}
    file, filled = "", 0
    for name in names:
        key, index, lead = stored_place(name, model)
        shape, to = weights.shape(name), written_dtype(weights, name, dtype)
        sizes = (*(1 for _ in index), *shape)
        blocks = _chunk_blocks(weights, name, sizes, to)
        length = sum(block.num_bytes for block in blocks)
        if not files or filled + length > max_file_bytes:
            file, filled = f"__0_{len(files)}.distcp", 0
            files[file] = []
        files[file] += blocks
        place = _StorageInfo(file, filled, length)
        offsets = (*index, *(0 for _ in shape))
        every.append(_Saved(key, offsets, sizes, (*lead, *shape), to, place))
        filled += length
    write_files(folder, files, on_bytes=on_bytes)
    with (folder / METADATA).open("wb") as opened:
        pickle.dump(_metadata(every), opened)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    return sum(saved.place.length for saved in every)


def _chunk_blocks(
    weights: Weights, name: str, sizes: tuple[int, ...], dtype: torch.dtype
) -> list[Block]:
    """One weight as ``torch.save`` would write it, with its index in front of its shape."""
    blocks: list[Block] = []
    for part in _chunk_layout(sizes, dtype):
        if isinstance(part, bytes):
            blocks.append(bytes_block(part))
        else:
            blocks += weight_blocks(weights, name, [(0, weights.shape(name)[0])], dtype)
    return blocks


@cache
def _chunk_layout(sizes: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes | int, ...]:
    return saved_layout(lambda: torch.empty(sizes, dtype=dtype))


def _metadata(every: Sequence[_Saved]) -> Metadata:
    tensors: dict[str, TensorStorageMetadata] = {}
    for saved in every:
        tensor = tensors.setdefault(
            saved.key,
            TensorStorageMetadata(TensorProperties(saved.dtype), torch.Size(saved.whole), []),
        )
        tensor.chunks.append(
            ChunkStorageMetadata(torch.Size(saved.offsets), torch.Size(saved.sizes))
        )
    places = {MetadataIndex(saved.key, saved.offsets): saved.place for saved in every}
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)
