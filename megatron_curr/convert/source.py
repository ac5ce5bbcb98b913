"""What a conversion reads: a run, one of its checkpoints, a converted one, a published model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from megatron_curr.convert.family import Family, Piece
from megatron_curr.convert.hf_config import choose_family, family_of, model_of, read_config
from megatron_curr.convert.published import PublishedWeights, check_published, open_published
from megatron_curr.convert.stored import METADATA, StoredTensors, open_stored
from megatron_curr.convert.weights import Weights
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training.checkpoint_folder import (
    RunState,
    find_fault,
    list_checkpoints,
    read_state,
)

Which = Literal["raw", "ema"]
"""Of a run: the trained weights, or their moving average."""
MODEL_FILE = "model.yaml"
CARRIED = "published"
AVERAGED = "the moving average of the trained weights"
NO_AVERAGE = (
    "{path}: is no run, so it has no average; take its weights as they are (--weights raw, "
    "init_from: checkpoint:...)"
)
_HASH_THREADS = 2


@dataclass(frozen=True)
class RunSource:
    """A run, and its clock at the checkpoint."""

    folder: Path
    recipe: Recipe
    state: RunState
    passed_over: tuple[str, ...]  # newer checkpoints that are torn, and why


@dataclass(frozen=True)
class Source:
    """Weights under our names, and what is known about them."""

    path: Path
    """The checkpoint, or the Hugging Face folder."""
    weights: Weights
    model: Model
    vocab_size: int
    architecture: str | None
    """The one it was published as, where it was."""
    run: RunSource | None = None
    carried: Path | None = None
    """Folder of tokenizer and other files that go along as they are."""
    made_by: str | None = None
    """The arithmetic on several sources that this one is; the first gives all but the weights."""
    others: tuple[Path, ...] = ()
    """The folders of the rest of them."""
    earlier: str | None = None
    """The arithmetic that made what ``path`` holds, where a merge was written as a checkpoint."""

    @property
    def history(self) -> str | None:
        """What was done to the weights since they were trained; None for nothing."""
        return ", the first of them ".join(filter(None, (self.made_by, self.earlier))) or None

    def plan(self, **settings: str | int | None) -> dict[str, Any]:
        """What must stay the same for files of a conversion that was cut short to be kept."""
        return {
            "source": str(self.path.resolve()),
            "made_by": self.made_by,
            "files": [_files_as_they_are(path) for path in (self.path, *self.others)],
            **settings,
        }

    def family(self, architecture: str | None = None) -> Family:
        """What it is published as. Raises ``RecipeError`` when nothing is exactly this model."""
        try:
            return choose_family(self.model, architecture=architecture or self.architecture)
        except RecipeError as error:
            if architecture is not None:
                raise
            raise RecipeError(
                f"{self.path}: {error}\nit stays a checkpoint, or is trained with other settings"
            ) from error

    def pieces(self, family: Family) -> tuple[Piece, ...]:
        """Every tensor of the published model; raises ``CheckpointError`` if weights differ."""
        pieces = tuple(family.pieces(self.model, vocab_size=self.vocab_size))
        if isinstance(self.weights, StoredTensors):
            check_stored(self.weights, pieces, self.model)
        return pieces


def _files_as_they_are(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of a file, or of every file in a folder."""
    files = [file for file in sorted(path.iterdir()) if file.is_file()] if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.suffix != ".lock"]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]


def open_source(path: Path, *, trust_pickle: bool = False, which: Which = "raw") -> Source:
    """Raises ``CheckpointError`` when ``path`` is none of these, or damaged."""
    if which == "ema" and ((path / MODEL_FILE).is_file() or (path / "config.json").is_file()):
        raise CheckpointError(NO_AVERAGE.format(path=path))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run, a checkpoint or a model folder")
    if (path / MODEL_FILE).is_file():
        return _open_converted(path)
    if (path / "config.json").is_file():
        return _open_published(path, trust_pickle=trust_pickle)
    run = find_run(path)
    model, checkpoint = run[0].recipe.model, run[1]
    vocab_size = model.vocab_size or load_tokenizer(run[0].recipe.data.tokenizer).vocab_size
    return Source(
        checkpoint,
        open_weights(checkpoint, which),
        model,
        vocab_size,
        None,
        run=run[0],
        made_by=AVERAGED if which == "ema" else None,
    )


def open_weights(checkpoint: Path, which: Which) -> StoredTensors:
    """The trained weights of a run's checkpoint, or their moving average.

    Raises ``CheckpointError`` when it is none, or holds no average.
    """
    if which == "raw":
        return open_stored(checkpoint)
    from megatron_curr.training.optimizer_state import AVERAGE  # megatron-core takes seconds

    stored = open_stored(checkpoint, prefix=f"optimizer.state.{AVERAGE}.")
    if not stored.tensors:
        raise CheckpointError(
            f"{checkpoint}: holds no moving average of the weights; train with training.ema_decay, "
            "or take the trained ones (--weights raw, init_from: checkpoint:...)"
        )
    for name, tensor in open_stored(checkpoint).tensors.items():
        if name.endswith("expert_bias"):  # is moved by rule, not by the optimizer
            stored.tensors[name] = tensor
    return stored


def find_run(path: Path) -> tuple[RunSource, Path]:
    """The run's newest intact checkpoint, or the very one that ``path`` names.

    Raises ``CheckpointError`` when there is none, or the one named is torn.
    """
    if (path / METADATA).is_file():
        folder, candidates = path.resolve().parent.parent, [path]
    else:
        folder, candidates = path, list(reversed(list_checkpoints(path / "checkpoints")))
    if not (folder / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path}: neither a run folder (no recipe.yaml) nor a checkpoint inside one, nor a "
            "model (no config.json); give a folder such as runs/demo_text or "
            "runs/demo_text/checkpoints/step_00000123"
        )
    if not candidates:
        raise CheckpointError(f"{folder}: no checkpoint yet; train until the first one is saved")
    faults: list[str] = []
    for checkpoint in candidates:
        fault = _fault(checkpoint)
        if fault is None:
            recipe = load_recipe(folder / "recipe.yaml")
            run = RunSource(folder, recipe, read_state(checkpoint), tuple(faults))
            return run, checkpoint
        faults.append(f"{checkpoint.name}: {fault}")
    raise CheckpointError(
        f"{folder}: no intact checkpoint to convert ({'; '.join(faults)}); restore one from a copy"
    )


def _fault(checkpoint: Path) -> str | None:
    """``find_fault`` with files hashed side by side."""
    shares = [(index, _HASH_THREADS) for index in range(_HASH_THREADS)]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        faults = list(pool.map(lambda share: find_fault(checkpoint, share=share), shares))
    return next(filter(None, faults), None)


def _open_published(folder: Path, *, trust_pickle: bool) -> Source:
    try:
        config = read_config(folder)
        family = family_of(config)
        model = model_of(config, family)
        tensors = open_published(folder, trust_pickle=trust_pickle)
        vocab_size = model.vocab_size
        assert vocab_size
        pieces = tuple(family.pieces(model, vocab_size=vocab_size))
        check_published(tensors, pieces, family, model=model)
    except CheckpointError as error:  # tables of families know no folder
        told = str(error)
        if str(folder) not in told:
            told = f"{folder}/{told}" if told.startswith("config.json:") else f"{folder}: {told}"
        raise CheckpointError(told) from error
    weights = PublishedWeights(tensors, pieces)
    return Source(folder, weights, model, vocab_size, family.architecture, carried=folder)


def _open_converted(folder: Path) -> Source:
    path = folder / MODEL_FILE
    try:
        told: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        model = Model(**told["model"])
        architecture, vocab_size = told["architecture"], model.vocab_size
    except (yaml.YAMLError, ValidationError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}); convert the model again") from error
    if vocab_size is None:
        raise CheckpointError(f"{path}: vocab_size is missing; convert the model again")
    carried = folder / CARRIED
    return Source(
        folder,
        open_stored(folder),
        model,
        vocab_size,
        architecture,
        carried=carried if carried.is_dir() else None,
        earlier=told.get("history"),
    )


def check_stored(stored: StoredTensors, pieces: Sequence[Piece], model: Model) -> None:
    """Raise ``CheckpointError`` for a tensor that is missing, left over, or of another size."""

    def foreign(found: str) -> CheckpointError:
        return CheckpointError(
            f"{stored.checkpoint}: {found}; the checkpoint was saved with another recipe: put that "
            "one back as recipe.yaml (of a converted one, its model.yaml)"
        )

    for name, tensor in stored.tensors.items():
        alike = name.startswith("decoder.layers.") and not name.split(".")[2].isdigit()
        if alike and tensor.shape[0] != model.num_layers:
            raise foreign(f"{name} has {tensor.shape[0]} layers and the recipe {model.num_layers}")
        if ".experts.experts." in name and tensor.shape[0] != model.num_moe_experts:
            raise foreign(
                f"{name} has {tensor.shape[0]} experts and the recipe {model.num_moe_experts}"
            )
    heights: dict[str, int] = {}
    for piece in pieces:
        height = max(end for _, end in piece.rows)
        heights[piece.stored] = max(heights.get(piece.stored, 0), height)
    used = set()
    for piece in pieces:
        shape, height = stored.shape(piece.stored), heights[piece.stored]
        used.add(stored.place(piece.stored)[0].name)
        if shape[1:] != piece.shape[1:]:
            wide = shape[-1] if len(shape) > 1 else 1
            raise foreign(f"{piece.stored} is {wide} wide and the recipe {piece.shape[-1]}")
        if shape[0] < height or (shape[0] > height and not piece.is_vocabulary):
            raise foreign(f"{piece.stored} has {shape[0]} rows and the recipe {height}")
    if extra := sorted(set(stored.tensors) - used):
        raise foreign(f"{', '.join(extra[:4])} has no place in the published model")
