"""The tensors of a Hugging Face folder, mapped; and the same as weights of ours, by a table."""

from __future__ import annotations

import json
import mmap
import pickle
import re
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
_NOT_WEIGHTS = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
# What modules once kept in their state: masks of attention and tables of rotations.
_ROTATIONS = re.compile(r".*\brotary_emb\.(inv_freq|original_inv_freq|(cos|sin)_cached)")
_MASKS = re.compile(r".*\b(attn|attention|self_attn)\.(bias|masked_bias|causal_mask)")


def open_published(folder: Path, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Views of every weight of the folder's weight files, by name; buffers are passed over.

    Files of safetensors, or torch's own read with ``weights_only``; ``trust_pickle`` gives that
    up. Raises ``CheckpointError`` that names the file, and the tensor where there is one.
    """
    tensors: dict[str, Tensor] = {}
    index, files = _weight_files(folder)
    for path in files:
        found = (
            read_safetensors(path)
            if path.suffix == ".safetensors"
            else read_torch(path, trust_pickle=trust_pickle)
        )
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{path}: {twice[0]} is in another file of the folder, too; remove one"
            )
        tensors.update(found)
    if index is not None:
        _check_index(index, tensors)
    return {name: tensor for name, tensor in tensors.items() if not is_buffer(name, tensor)}


def is_buffer(name: str, tensor: Tensor) -> bool:
    """Whether it is a mask or a table of rotations, of any dtype, and no weight."""
    # The bias of a linear may go by the name of a mask; it is a vector, which no mask is.
    return bool(_ROTATIONS.fullmatch(name) or (tensor.dim() != 1 and _MASKS.fullmatch(name)))


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
        raise CheckpointError(
            f"{path}: is no whole safetensors file: {error}; download it again"
        ) from error


def _view(mapped: memoryview, base: int, name: str, entry: Mapping[str, Any]) -> Tensor:
    known = DTYPES | _NOT_WEIGHTS
    if entry["dtype"] not in known:
        raise ValueError(
            f"{name} is {entry['dtype']}; only {', '.join(DTYPES)} convert: dequantise it first"
        )
    start, end = entry["data_offsets"]
    dtype, shape = known[entry["dtype"]], tuple(entry["shape"])
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
        raise CheckpointError(f"{path}: cannot be read ({error}); download it again") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise CheckpointError(
            f"{path}: is no mapping of names to tensors; save the model's state_dict alone"
        )
    return found


def _weight_files(folder: Path) -> tuple[Path | None, list[Path]]:
    """The index, where there is one, and the files of the weights; others do not matter.

    As transformers chooses: safetensors before torch's own, one file before several.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, whole = folder / f"{name}.index.json", folder / name
        try:
            files = sorted(set(_listed(index).values())) if index.is_file() else []
        except CheckpointError:
            if not whole.is_file():
                raise
            files = []
        if whole.is_file() and name not in files:
            return None, [whole]
        if files:
            paths = [folder / file for file in files]
            if absent := [path for path in paths if not path.is_file()]:
                raise CheckpointError(
                    f"{absent[0]}: is missing, and {index.name} lists it; download it"
                )
            return index, paths
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
        raise CheckpointError(f"{index}: is damaged ({error}); download it again") from error


def _check_index(index: Path, tensors: Mapping[str, Tensor]) -> None:
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
                "config.json has it; download the model whole"
            )
        if tensors[name].dtype not in DTYPES.values():
            raise CheckpointError(
                f"{name} is {str(tensors[name].dtype).removeprefix('torch.')}; only "
                f"{', '.join(DTYPES)} convert: dequantise it first"
            )
        found = tuple(tensors[name].shape)
        if found != piece.shape:
            raise CheckpointError(
                f"{name} is {found} and {config} {piece.shape}; take the config of these weights"
            )
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
        raise CheckpointError(
            f"{name} has no place in {family.architecture}: refusing to drop it; remove it from "
            "the files where the model computes without it"
        )
