"""The tensors of a Hugging Face folder, mapped; and the same as weights of ours, by a table."""

from __future__ import annotations

import json
import mmap
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_curr.convert.family import Family, Piece
from megatron_curr.convert.saved_tensor import view_of_bytes
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.model import Model

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def open_published(folder: Path, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Views of every tensor of the folder's weight files, by name.

    Files of safetensors, or torch's own read with ``weights_only``; ``trust_pickle`` gives that
    up. Raises ``CheckpointError`` that names the file, and the tensor where there is one.
    """
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        found = (
            read_safetensors(path)
            if path.suffix == ".safetensors"
            else read_torch(path, trust_pickle=trust_pickle)
        )
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(f"{path}: {twice[0]} is in another file of the folder, too")
        tensors.update(found)
    _check_index(folder, tensors)
    return tensors


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Views of every tensor of one file. Raises ``CheckpointError`` when it is not whole."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = int.from_bytes(file.read(8), "little")
            if size < 8 + head or head < 2:
                raise ValueError(f"it has {size:,} bytes and its header ends at {8 + head:,}")
            header = json.loads(file.read(head))
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        header.pop("__metadata__", None)
        last = max((8 + head + entry["data_offsets"][1] for entry in header.values()), default=0)
        if last > size:
            raise ValueError(f"it has {size:,} bytes of {last:,}: it was cut short")
        return {name: _view(mapped, 8 + head, name, entry) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is no whole safetensors file: {error}") from error


def _view(mapped: memoryview, base: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    if entry["dtype"] not in DTYPES:
        raise ValueError(
            f"{name} is {entry['dtype']}; only {', '.join(DTYPES)} convert: dequantise it first"
        )
    start, end = entry["data_offsets"]
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    if end - start != dtype.itemsize * torch.Size(shape).numel():
        raise ValueError(f"{name} has {end - start:,} bytes, which is not its shape {shape}")
    return view_of_bytes(mapped[base + start : base + end], dtype).view(shape)


def read_torch(path: Path, *, trust_pickle: bool) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors, and reading it would run code from it; convert it "
            "to safetensors where you trust it, or give --trust-pickle"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(f"{path}: is no mapping of names to tensors")
    return found


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            files = [folder / file for file in sorted(set(_listed(index).values()))]
            if absent := [path for path in files if not path.is_file()]:
                raise CheckpointError(f"{absent[0]}: is missing, and {index.name} lists it")
            return files
        if (folder / name).is_file():
            return [folder / name]
    raise CheckpointError(
        f"{folder}: no model.safetensors or pytorch_model.bin, nor an index of several; give the "
        "folder of a model that was downloaded whole"
    )


def _listed(index: Path) -> dict[str, str]:
    """Name of every tensor to the file the index says it is in."""
    try:
        listed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is damaged ({error})") from error


def _check_index(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    for index in folder.glob("*.index.json"):
        for name, file in _listed(index).items():
            if name not in tensors:
                raise CheckpointError(
                    f"{index}: lists {name} in {file}, where it is not; download that file again"
                )


@dataclass(frozen=True)
class _Part:
    """Rows of one of our weights, and where they are published."""

    start: int
    end: int
    published: str
    from_row: int


class PublishedWeights:
    """Our weights, read out of a Hugging Face folder's tensors by a family's table."""

    def __init__(self, tensors: Mapping[str, Tensor], pieces: Iterable[Piece]) -> None:
        self._tensors = tensors
        self._parts: dict[str, list[_Part]] = {}
        for piece in pieces:
            at = 0
            for start, end in piece.rows:
                part = _Part(start, end, piece.published, at)
                self._parts.setdefault(piece.stored, []).append(part)
                at += end - start

    def names(self) -> list[str]:
        """Every weight, in the order of the forward pass."""
        return list(self._parts)

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one weight, its vocabulary not padded."""
        parts = self._parts[name]
        return (max(part.end for part in parts), *self._tensors[parts[0].published].shape[1:])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one weight."""
        return self._tensors[self._parts[name][0].published].dtype

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows [start, end) of one weight: a view where they lie together, else a copy."""
        height, *width = self.shape(name)
        end = height if end is None else end
        whole: Tensor | None = None
        for part in self._parts[name]:
            first, last = max(start, part.start), min(end, part.end)
            if first >= last:
                continue
            at = part.from_row - part.start
            values = self._tensors[part.published][first + at : last + at]
            if (first, last) == (start, end):
                return values
            if whole is None:
                whole = torch.empty((end - start, *width), dtype=values.dtype)
            whole[first - start : last - start] = values
        assert whole is not None, name
        return whole


def check_published(
    tensors: Mapping[str, Tensor], pieces: Iterable[Piece], family: Family, *, model: Model
) -> None:
    """Raise ``CheckpointError`` for the first tensor missing, left over, or of another shape."""
    tied = not model.untie_embeddings_and_output_weights
    wanted = {piece.published: piece for piece in pieces}
    config = "config.json says"
    for name, piece in wanted.items():
        if name not in tensors:
            if piece.is_vocabulary and not tied and name == list(wanted)[-1]:
                raise CheckpointError(
                    f"{name} is missing: {config} tie_word_embeddings is false, and the weights "
                    "have no output layer of their own; set it to true, or add the tensor"
                )
            raise CheckpointError(
                f"{name} is missing from the weight files; {family.architecture} of this "
                "config.json has it"
            )
        found = tuple(tensors[name].shape)
        if found != piece.shape:
            raise CheckpointError(f"{name} is {found} and {config} {piece.shape}")
    output, table = family.tail[-1].published, family.head[0].published
    for name in tensors:
        if name in wanted or family.is_ignored(name, model):
            continue
        if name == output and tied:
            if torch.equal(tensors[name], tensors[table]):
                continue  # a copy that some folders carry along
            raise CheckpointError(
                f"{name} differs from {table}, and {config} tie_word_embeddings is true; set it to "
                "false, or remove the tensor"
            )
        raise CheckpointError(f"{name} has no place in {family.architecture}: refusing to drop it")
