"""Tensors straight from the chunks of a ``torch_dist`` checkpoint: no process group, no model.

``.metadata`` lists every tensor's shape and, for each chunk, its place in the tensor, its file and
its bytes. Layers that are alike are one tensor with the layer as its first dim. ``.metadata`` is a
pickle; the unpickler here admits the classes that torch's checkpoint writer puts there and nothing
else, and chunks load with ``weights_only``, so reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_curr.errors import CheckpointError

METADATA = ".metadata"
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
# Whole names only: a dotted name would reach what a module imports.
_ADMITTED = {
    "torch": {"Size", *_DTYPES},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata"),
    },
    "torch.distributed.checkpoint.planner": {
        *("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"),
    },
}


@dataclass(frozen=True)
class Chunk:
    """A stored box of a tensor and the bytes that hold it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    first_byte: int
    num_bytes: int


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint, as it is cut into chunks."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class StoredTensors:
    """Every tensor of one checkpoint, read when asked for. Keeps the last one read."""

    def __init__(self, checkpoint: Path, tensors: dict[str, StoredTensor]) -> None:
        self.checkpoint = checkpoint
        self._tensors = tensors
        self._last: tuple[tuple[str, int | None], Tensor] | None = None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> StoredTensor:
        """Raises ``CheckpointError`` that names the tensor and some the checkpoint has."""
        if name not in self._tensors:
            known = ", ".join(sorted(self._tensors)[:4]) or "none"
            raise CheckpointError(
                f"{self.checkpoint}: tensor {name!r} is missing; the checkpoint has {known}, ...; "
                "was it saved with another recipe?"
            )
        return self._tensors[name]

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """The whole tensor, or one layer of a tensor whose first dim is the layer.

        Raises ``CheckpointError`` when a chunk is missing, damaged or not where it should be.
        """
        key = (name, layer)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._assemble(self[name], layer))
        return self._last[1]

    def _assemble(self, stored: StoredTensor, layer: int | None) -> Tensor:
        lead = 0 if layer is None else 1
        whole = torch.empty(stored.shape[lead:], dtype=stored.dtype)
        filled = 0
        for chunk in stored.chunks:
            if layer is not None and not 0 <= layer - chunk.offsets[0] < chunk.sizes[0]:
                continue
            values = self._load(stored, chunk)
            if layer is not None:
                values = values[layer - chunk.offsets[0]]
            box = tuple(
                slice(offset, offset + size)
                for offset, size in zip(chunk.offsets[lead:], chunk.sizes[lead:], strict=True)
            )
            whole[box] = values
            filled += values.numel()
        if filled != whole.numel():
            raise CheckpointError(
                f"{self.checkpoint}: {stored.name} has {filled:,} of {whole.numel():,} values"
                + (f" of layer {layer}" if layer is not None else "")
                + "; the save was cut short, use another checkpoint"
            )
        return whole

    def _load(self, stored: StoredTensor, chunk: Chunk) -> Tensor:
        path = self.checkpoint / chunk.file
        try:
            with path.open("rb") as file:
                file.seek(chunk.first_byte)
                data = file.read(chunk.num_bytes)
            values = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                f"{path}: bytes {chunk.first_byte:,} to {chunk.first_byte + chunk.num_bytes:,}, a "
                f"part of {stored.name}, cannot be read ({error}); use another checkpoint"
            ) from error
        if tuple(values.shape) != chunk.sizes or values.dtype != stored.dtype:
            raise CheckpointError(
                f"{path}: a part of {stored.name} is {values.dtype} {tuple(values.shape)} and not "
                f"{stored.dtype} {chunk.sizes}; use another checkpoint"
            )
        return values


def open_stored(checkpoint: Path) -> StoredTensors:
    """The tensors of a checkpoint folder. Raises ``CheckpointError`` when it is not one."""
    path = checkpoint / METADATA
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint}: no {METADATA}, so this is not a torch_dist checkpoint; give a folder "
            "such as runs/demo_text/checkpoints/step_00000123"
        )
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        places: dict[tuple[str, tuple[int, ...]], Any] = {
            (index.fqn, tuple(index.offset)): place
            for index, place in metadata.storage_data.items()
            if index.offset is not None
        }
        tensors = {
            name: _stored_tensor(name, entry, places)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is damaged or was not written by a checkpoint save ({error})"
        ) from error
    return StoredTensors(checkpoint, tensors)


def _stored_tensor(
    name: str, entry: TensorStorageMetadata, places: dict[tuple[str, tuple[int, ...]], Any]
) -> StoredTensor:
    chunks = []
    for chunk in entry.chunks:
        place = places[name, tuple(chunk.offsets)]
        if Path(place.relative_path).name != place.relative_path:
            raise KeyError(f"chunk file {place.relative_path!r} lies outside the checkpoint")
        chunks.append(
            Chunk(
                offsets=tuple(chunk.offsets),
                sizes=tuple(chunk.sizes),
                file=place.relative_path,
                first_byte=int(place.offset),
                num_bytes=int(place.length),
            )
        )
    return StoredTensor(name, tuple(entry.size), entry.properties.dtype, tuple(chunks))


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")
        return super().find_class(module, name)
