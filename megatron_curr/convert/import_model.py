"""Weights as a ``torch_dist`` checkpoint that any layout loads, with what is known about them.

The folder holds what megatron-core's loader reads, ``model.yaml`` (the model section for a recipe)
and ``published/`` (tokenizer and other files of the model, carried along).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from megatron_curr.convert.carried import carry_files, left_behind
from megatron_curr.convert.export import read_dtype
from megatron_curr.convert.source import CARRIED, MODEL_FILE, Source
from megatron_curr.convert.target import check_empty, written_beside
from megatron_curr.convert.torch_dist_out import CHUNK_FILE_BYTES, write_torch_dist
from megatron_curr.recipe.model import Model


@dataclass(frozen=True)
class Import:
    """What was written."""

    folder: Path
    source: Path
    architecture: str
    num_parameters: int
    size_bytes: int
    notes: tuple[str, ...]
    """What of the source is not in it."""


def import_model(
    source: Source,
    output: Path,
    *,
    dtype: str | None = None,
    max_file_bytes: int = CHUNK_FILE_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Import:
    """Write ``source`` as a checkpoint, beside its place until it is whole.

    ``check`` is shown the folder before it takes its place. Raises a ``UserError`` and leaves
    nothing behind when the target is not empty or tensors do not match.
    """
    check_empty(output)
    to = read_dtype(dtype)
    family = source.family()
    pieces = source.pieces(family)
    names = list(dict.fromkeys(piece.stored for piece in pieces))
    plan = source.plan(to="checkpoint", dtype=dtype, max_file_bytes=max_file_bytes)
    with written_beside(output, plan) as folder:
        size = write_torch_dist(
            source.weights,
            names,
            folder,
            model=source.model,
            dtype=to,
            max_file_bytes=max_file_bytes,
            on_bytes=on_bytes,
        )
        model = source.model.model_copy(update={"vocab_size": source.vocab_size, "preset": None})
        told = {"architecture": family.architecture, "model": model_section(model)}
        if source.history:
            told["history"] = source.history
        (folder / MODEL_FILE).write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
        notes: tuple[str, ...] = ()
        if source.carried:
            (folder / CARRIED).mkdir(exist_ok=True)
            notes = left_behind(source.carried, carry_files(source.carried, folder / CARRIED))
            config = source.carried / "config.json"
            if config.is_file():
                shutil.copyfile(config, folder / CARRIED / config.name)
        check(folder)
    return Import(
        folder=output,
        source=source.path,
        architecture=family.architecture,
        num_parameters=sum(piece.num_values for piece in pieces),
        size_bytes=size,
        notes=notes,
    )


def model_section(model: Model) -> dict[str, object]:
    """The settings of a recipe's ``model``, those that are not the default."""
    return model.model_dump(exclude_defaults=True)
