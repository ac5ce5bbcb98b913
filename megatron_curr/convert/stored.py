"""Tensors straight from the chunks of a ``torch_dist`` checkpoint: no process group, no model.

``.metadata`` lists every tensor's shape and, for each chunk, its place in the tensor, its file and
its bytes. Layers that are alike are one tensor with the layer as its first dim. ``.metadata`` is a
pickle; the unpickler here admits the classes that torch's checkpoint writer puts there and nothing
else, and chunks are mapped by their description, so reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import mmap
import pickle
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_curr.convert.saved_tensor import view_of_saved_tensor
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.model import Model

METADATA = ".metadata"
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
_LAYER = re.compile(r"(decoder\.layers\.)(\d+)\.(.*)")
_EXPERT = re.compile(r"(.*\.experts\.experts\.)(\d+)\.(.*)")
_ALIKE_LAYERS = re.compile(r"(decoder\.layers\.)(?!\d+\.)(.+)")
_ALIKE_EXPERTS = re.compile(r"(.*\.experts\.experts\.)(?!\d+\.)(.+)")
# What a checkpoint holds besides the model's weights.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state")
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
    """Every weight of one checkpoint, read when asked for, from mapped files. Thread-safe.

    Weights go by their full names (``decoder.layers.7...``, ``experts.experts.3...``). Where
    layers, or experts, are one stored tensor, those are its first dims.
    """

    def __init__(self, checkpoint: Path, tensors: dict[str, StoredTensor]) -> None:
        self.checkpoint = checkpoint
        self.tensors = tensors
        self._maps: dict[str, memoryview] = {}
        self._grouped: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}
        self._lock = Lock()

    def __contains__(self, name: str) -> bool:
        return any(key in self.tensors for key, _ in _keys(name))

    def place(self, name: str) -> tuple[StoredTensor, tuple[int, ...]]:
        """The stored tensor that holds a weight, and the weight's index in its first dims.

        Raises ``CheckpointError`` that names the weight and some the checkpoint has.
        """
        for key, index in _keys(name):
            if key in self.tensors:
                stored = self.tensors[key]
                beyond = [at for at, size in zip(index, stored.shape, strict=False) if at >= size]
                if not beyond:
                    return stored, index
        known = ", ".join(sorted(self.tensors)[:4]) or "none"
        raise CheckpointError(
            f"{self.checkpoint}: tensor {name!r} is missing; the checkpoint has {known}, ...; "
            "it was saved with another recipe: put that one back as recipe.yaml"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one weight."""
        stored, index = self.place(name)
        return stored.shape[len(index) :]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one weight."""
        return self.place(name)[0].dtype

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows [start, end) of one weight: a view of the file where they lie together, else a copy.

        Raises ``CheckpointError`` when a chunk is missing, damaged or not where it should be.
        """
        stored, index = self.place(name)
        lead = len(index)
        shape = stored.shape[lead:]
        end = shape[0] if end is None else end
        whole: Tensor | None = None
        filled = 0
        for chunk in self._chunks(stored, index):
            box = tuple(zip(chunk.offsets, chunk.sizes, strict=True))
            first, last = max(start, box[lead][0]), min(end, sum(box[lead]))
            if first >= last:
                continue
            values = self._view(stored, chunk)
            for i, (offset, _) in zip(index, box[:lead], strict=True):
                values = values[i - offset]
            values = values[first - box[lead][0] : last - box[lead][0]]
            if values.shape == (end - start, *shape[1:]):
                return values
            if whole is None:
                whole = torch.empty((end - start, *shape[1:]), dtype=stored.dtype)
            rest = tuple(slice(offset, offset + size) for offset, size in box[lead + 1 :])
            whole[(slice(first - start, last - start), *rest)] = values
            filled += values.numel()
        if whole is None or filled != whole.numel():
            raise CheckpointError(
                f"{self.checkpoint}: {name} has {filled:,} of its values in rows {start:,} to "
                f"{end:,}; the save was cut short, use another checkpoint"
            )
        return whole

    def _chunks(self, stored: StoredTensor, index: tuple[int, ...]) -> list[Chunk]:
        """The chunks with a part of the weight at ``index``: hundreds of experts are one tensor."""
        key = (stored.name, len(index))
        with self._lock:
            if key not in self._grouped:
                grouped: dict[tuple[int, ...], list[Chunk]] = {}
                for chunk in stored.chunks:
                    ends = zip(chunk.offsets[: key[1]], chunk.sizes[: key[1]], strict=True)
                    for place in product(*(range(at, at + size) for at, size in ends)):
                        grouped.setdefault(place, []).append(chunk)
                self._grouped[key] = grouped
            return self._grouped[key].get(index, [])

    def _view(self, stored: StoredTensor, chunk: Chunk) -> Tensor:
        """The chunk's values, mapped and not copied."""
        path = self.checkpoint / chunk.file
        try:
            blob = self._map(chunk.file)[chunk.first_byte : chunk.first_byte + chunk.num_bytes]
            values = view_of_saved_tensor(blob)
        except (OSError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
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

    def _map(self, file: str) -> memoryview:
        with self._lock:
            if file not in self._maps:
                with (self.checkpoint / file).open("rb") as opened:
                    mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
                self._maps[file] = memoryview(mapped)
            return self._maps[file]


def _keys(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The names under which a weight may be stored, and its index there."""
    layer, expert = _LAYER.fullmatch(name), _EXPERT.fullmatch(name)
    yield name, ()
    if expert:
        yield expert[1] + expert[3], (int(expert[2]),)
    if layer:
        yield layer[1] + layer[3], (int(layer[2]),)
    if layer and expert:
        both = _EXPERT.fullmatch(layer[1] + layer[3])
        assert both
        yield both[1] + both[3], (int(layer[2]), int(both[2]))


def stored_place(name: str, model: Model) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Where megatron-core stores a weight of this model: key, index in its first dims, their size.

    Layers that are alike are one tensor; with experts it takes none to be. Experts always are.
    """
    index: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    if (layer := _LAYER.fullmatch(name)) and model.num_moe_experts is None:
        name, index, lead = layer[1] + layer[3], (int(layer[2]),), (model.num_layers,)
    if expert := _EXPERT.fullmatch(name):
        assert model.num_moe_experts
        name = expert[1] + expert[3]
        index, lead = (*index, int(expert[2])), (*lead, model.num_moe_experts)
    return name, index, lead


def weight_name(key: str, offsets: Sequence[int]) -> tuple[str, int]:
    """Inverse of ``stored_place``: a weight's full name, and how many first dims lead to it."""
    lead = 0
    if alike := _ALIKE_LAYERS.fullmatch(key):
        key, lead = f"{alike[1]}{offsets[0]}.{alike[2]}", 1
    if experts := _ALIKE_EXPERTS.fullmatch(key):
        key, lead = f"{experts[1]}{offsets[lead]}.{experts[2]}", lead + 1
    return key, lead


def open_stored(checkpoint: Path, *, prefix: str = "") -> StoredTensors:
    """The weights of a checkpoint folder; with ``prefix``, what goes by their names after it.

    Raises ``CheckpointError`` when the folder is no checkpoint.
    """
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
            name.removeprefix(prefix): _stored_tensor(name, entry, places, prefix=prefix)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            and (name.startswith(prefix) if prefix else not name.startswith(_NOT_WEIGHTS))
        }
    except (pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: is damaged or was not written by a checkpoint save ({error}); use another "
            "checkpoint"
        ) from error
    return StoredTensors(checkpoint, tensors)


def _stored_tensor(
    name: str,
    entry: TensorStorageMetadata,
    places: dict[tuple[str, tuple[int, ...]], Any],
    *,
    prefix: str,
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
    name, shape = name.removeprefix(prefix), tuple(entry.size)
    return StoredTensor(name, shape, entry.properties.dtype, tuple(chunks))


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ADMITTED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")
        return super().find_class(module, name)
