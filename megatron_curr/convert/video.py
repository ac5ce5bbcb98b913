"""Conversion of the video transformer: checkpoints here, MUG-V's release layout and its training's.

Published, a model is a folder with ``dit.pt``, the release's one file, or with safetensors and a
``config.json``; the names are the same. The release has no config: its shapes say all that the
weights do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from megatron_curr.convert.dit_file import write_dit_file
from megatron_curr.convert.export import MAX_FILE_BYTES, read_dtype, write_json
from megatron_curr.convert.family import Piece
from megatron_curr.convert.mugv import model_of_shapes, mugv_pieces
from megatron_curr.convert.mugv_checkpoint import (
    find_training_checkpoint,
    holds_video,
    open_training_checkpoint,
)
from megatron_curr.convert.published import PublishedWeights, open_published, read_torch
from megatron_curr.convert.run_conversion import Conversion, progress_bar
from megatron_curr.convert.safetensors_out import write_safetensors
from megatron_curr.convert.source import (
    AVERAGED,
    MODEL_FILE,
    NO_AVERAGE,
    Source,
    Which,
    check_stored,
    find_run,
    open_weights,
)
from megatron_curr.convert.stored import METADATA, StoredTensors, open_stored
from megatron_curr.convert.target import check_empty, written_beside
from megatron_curr.convert.torch_dist_out import write_torch_dist
from megatron_curr.convert.weights import written_dtype
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_schema import VideoRecipe

ARCHITECTURE = "MUGVDiT"
DIT_FILE = "dit.pt"
Target = Literal["mugv", "hf", "checkpoint"]
_WITHOUT_TEXT = "y_embedder.y_embedding"  # a constant that MUG-V's own converter puts beside
# What the recipe of a model has and its weights have not.
_NOT_ITS_OWN = {"preset", "init_method_std"}


def is_video(path: Path) -> bool:
    """Whether it is something of a video transformer, as far as its files tell."""
    if path.is_file():
        return path.suffix == ".pt"
    if (path / DIT_FILE).is_file():
        return True
    for name in ("config.json", MODEL_FILE):
        if (path / name).is_file():
            return ARCHITECTURE in (path / name).read_text(encoding="utf-8", errors="replace")
    if (checkpoint := find_training_checkpoint(path)) is not None:
        return holds_video(checkpoint)
    folder = path.resolve().parent.parent if (path / METADATA).is_file() else path
    recipe = folder / "recipe.yaml"
    return recipe.is_file() and isinstance(load_recipe(recipe), VideoRecipe)


def open_video_source(path: Path, *, which: Which = "raw", trust_pickle: bool = False) -> Source:
    """Weights under our names; ``which`` are those of a run: trained, or their moving average.

    Raises ``CheckpointError`` when ``path`` is no video model, damaged, or without an average.
    """
    if path.is_file() or (path / DIT_FILE).is_file() or (path / "config.json").is_file():
        source = _open_published(path, trust_pickle=trust_pickle)
    elif (path / MODEL_FILE).is_file():
        model = _read_model(path / MODEL_FILE, lambda told: told["model"])
        source = Source(path, open_stored(path), model, 0, ARCHITECTURE)
    elif (trained := find_training_checkpoint(path)) is not None:
        stored, model = open_training_checkpoint(trained, which)
        made_by = AVERAGED if which == "ema" else None
        return Source(trained, stored, model, 0, ARCHITECTURE, made_by=made_by)
    else:
        run, checkpoint = find_run(path)
        weights = open_weights(checkpoint, which)
        made_by = AVERAGED if which == "ema" else None
        return Source(checkpoint, weights, run.recipe.model, 0, None, run=run, made_by=made_by)
    if which == "ema":
        raise CheckpointError(NO_AVERAGE.format(path=path))
    return source


def convert_video(
    path: Path,
    output: Path,
    *,
    to: Target | None = None,
    dtype: str | None = None,
    which: Which = "raw",
    trust_pickle: bool = False,
) -> Conversion:
    """Write ``path`` to the folder ``output`` and read it back.

    ``to`` is ``mugv`` (dit.pt), ``hf`` (safetensors and a config) or ``checkpoint``; the default is
    dit.pt for a checkpoint and a checkpoint for the rest. Raises a ``UserError`` and leaves nothing
    behind when anything is wrong.
    """
    source = open_video_source(path, which=which, trust_pickle=trust_pickle)
    to = to or ("mugv" if isinstance(source.weights, StoredTensors) else "checkpoint")
    return convert_video_source(source, output, to=to, dtype=dtype)


def video_pieces(source: Source) -> tuple[Piece, ...]:
    """Every tensor of the published model; raises ``CheckpointError`` if weights differ."""
    pieces = tuple(mugv_pieces(source.model))
    if isinstance(source.weights, StoredTensors):
        check_stored(source.weights, pieces, source.model)
    return pieces


def convert_video_source(
    source: Source, output: Path, *, to: Target, dtype: str | None = None
) -> Conversion:
    """As ``convert_video``, of what is open already."""
    check_empty(output)
    cast = read_dtype(dtype)
    pieces = video_pieces(source)
    plan = source.plan(to=to, dtype=dtype)
    total = sum(piece.num_values * source.weights.dtype(piece.stored).itemsize for piece in pieces)
    with (
        written_beside(output, plan) as folder,
        progress_bar(f"{source.path.name} to {output.name}", total) as on_bytes,
    ):
        size = _write(source, pieces, folder, to=to, dtype=cast, on_bytes=on_bytes)
        _check_written(source, folder, pieces, cast)
    return Conversion(
        folder=output,
        source=source.path,
        architecture=ARCHITECTURE,
        num_parameters=sum(piece.num_values for piece in pieces),
        size_bytes=size,
        passed_over=source.run.passed_over if source.run else (),
        notes=(),
        agreement=None,
        verdict="read back: every value is the source's",
    )


def _write(
    source: Source,
    pieces: Sequence[Piece],
    folder: Path,
    *,
    to: Target,
    dtype: torch.dtype | None,
    on_bytes: Callable[[int], None],
) -> int:
    """A few rows at a time; returns the bytes of what was written."""
    weights, model = source.weights, source.model
    if to == "mugv":
        return write_dit_file(weights, pieces, folder / DIT_FILE, dtype=dtype, on_bytes=on_bytes)
    if to == "hf":
        write_json(folder / "config.json", _config(model))
        return write_safetensors(
            weights,
            pieces,
            folder,
            dtype=dtype,
            max_file_bytes=MAX_FILE_BYTES,
            on_bytes=on_bytes,
        ).size_bytes
    told = {"architecture": ARCHITECTURE, "model": model_section(model)}
    (folder / MODEL_FILE).write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
    names = list(dict.fromkeys(piece.stored for piece in pieces))
    return write_torch_dist(weights, names, folder, model=model, dtype=dtype, on_bytes=on_bytes)


def model_section(model: VideoDiT) -> dict[str, Any]:
    """The settings of a recipe's ``model`` that its weights have."""
    return model.model_dump(exclude=_NOT_ITS_OWN)


def _open_published(path: Path, *, trust_pickle: bool) -> Source:
    config = path / "config.json"
    file = path if path.is_file() else path / DIT_FILE
    if file.is_file():
        tensors = read_torch(file, trust_pickle=trust_pickle)
    else:
        tensors = open_published(path, trust_pickle=trust_pickle)
    tensors.pop(_WITHOUT_TEXT, None)
    try:
        model = model_of_shapes({name: tensor.shape for name, tensor in tensors.items()})
    except CheckpointError as reason:
        raise CheckpointError(f"{path}: {reason}") from reason
    if config.is_file():
        model = _read_model(config, _of_config)
    pieces = tuple(mugv_pieces(model))
    _check_published(path, tensors, pieces)
    return Source(path, PublishedWeights(tensors, pieces), model, 0, ARCHITECTURE)


def _check_published(path: Path, tensors: Mapping[str, Tensor], pieces: Sequence[Piece]) -> None:
    """Raise ``CheckpointError`` for the first tensor missing, of another shape, or left over."""
    for piece in pieces:
        if piece.published not in tensors:
            raise CheckpointError(f"{path}: {piece.published} is missing; download it again")
        found = tuple(tensors[piece.published].shape)
        if found != piece.shape:
            raise CheckpointError(
                f"{path}: {piece.published} is {found} and the other tensors ask for {piece.shape}"
            )
    if extra := sorted(tensors.keys() - {piece.published for piece in pieces}):
        raise CheckpointError(f"{path}: {extra[0]} is not of {ARCHITECTURE}: refusing to drop it")


def _check_written(
    source: Source, folder: Path, pieces: Sequence[Piece], dtype: torch.dtype | None
) -> None:
    """Read everything back. Raises ``CheckpointError`` for the first value that is not the same."""
    written = open_video_source(folder).weights
    for name in dict.fromkeys(piece.stored for piece in pieces):
        expected = source.weights.read(name)
        expected = expected.to(written_dtype(source.weights, name, dtype))
        if not torch.equal(_bytes(written.read(name)), _bytes(expected)):
            raise CheckpointError(
                f"{folder}: {name} does not read back as it was; is the disk sound?"
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _read_model(path: Path, fields: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> VideoDiT:
    read = json.loads if path.suffix == ".json" else yaml.safe_load
    try:
        return VideoDiT(**fields(read(path.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error})") from error


def _config(model: VideoDiT) -> dict[str, Any]:
    return {"architectures": [ARCHITECTURE], "model_type": "mugv_dit", **model_section(model)}


def _of_config(told: Mapping[str, Any]) -> Mapping[str, Any]:
    names = VideoDiT.model_fields.keys() & told.keys() - _NOT_ITS_OWN
    return {name: told[name] for name in names}
