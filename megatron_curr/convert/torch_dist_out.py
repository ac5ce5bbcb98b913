"""Weights as a ``torch_dist`` checkpoint, written without a process group or a model.

Every layer and every expert is one chunk, as megatron-core's own save makes them on one rank; its
loader cuts them for any layout. Optimizer state and ``_extra_state`` are not written.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_curr.convert.stored import METADATA, stored_place
from megatron_curr.convert.weights import Weights, written_dtype
from megatron_curr.recipe.model import Model

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
    num_threads: int = 2,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the weights of these names; returns their bytes."""
    shares = [names[number::num_threads] for number in range(num_threads)]

    def write_share(number: int) -> list[_Saved]:
        path = folder / f"__0_{number}.distcp"
        with path.open("wb") as file:
            saved = [
                _save(file, path.name, weights, name, model=model, dtype=dtype, on_bytes=on_bytes)
                for name in shares[number]
            ]
            file.flush()
            os.fsync(file.fileno())
        return saved

    with ThreadPoolExecutor(num_threads) as pool:
        every = [saved for share in pool.map(write_share, range(num_threads)) for saved in share]
    with (folder / METADATA).open("wb") as file:
        pickle.dump(_metadata(every), file)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(_FORMAT), encoding="utf-8")
    return sum(saved.place.length for saved in every)


def _save(
    file: BinaryIO,
    file_name: str,
    weights: Weights,
    name: str,
    *,
    model: Model,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None],
) -> _Saved:
    key, index, lead = stored_place(name, model)
    tensor = weights.read(name).to(written_dtype(weights, name, dtype)).contiguous()
    if tensor.untyped_storage().nbytes() != tensor.nbytes:
        tensor = tensor.clone()  # torch.save writes all that a view is a part of
    first_byte = file.tell()
    torch.save(tensor.view(*(1,) * len(index), *tensor.shape), file)
    on_bytes(tensor.nbytes)
    return _Saved(
        key=key,
        offsets=(*index, *(0 for _ in tensor.shape)),
        sizes=(*(1 for _ in index), *tensor.shape),
        whole=(*lead, *tensor.shape),
        dtype=tensor.dtype,
        place=_StorageInfo(file_name, first_byte, file.tell() - first_byte),
    )


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
