"""Which checkpoint a conversion reads, and what the run says about it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_curr.convert.stored import METADATA
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training.checkpoint_folder import (
    RunState,
    find_fault,
    list_checkpoints,
    read_state,
)


@dataclass(frozen=True)
class Source:
    """A checkpoint, its clock, and the run it belongs to."""

    run: Path
    checkpoint: Path
    recipe: Recipe
    state: RunState
    passed_over: tuple[str, ...]  # newer checkpoints that are torn, and why


def find_source(path: Path) -> Source:
    """The run's newest intact checkpoint, or the very one that ``path`` names.

    Raises ``CheckpointError`` when there is none, or the one named is torn.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run or one of its checkpoints")
    if (path / METADATA).is_file():
        run, candidates = path.resolve().parent.parent, [path]
    else:
        run, candidates = path, list(reversed(list_checkpoints(path / "checkpoints")))
    if not (run / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{path}: neither a run folder (no recipe.yaml) nor a checkpoint inside one; give a "
            "folder such as runs/demo_text or runs/demo_text/checkpoints/step_00000123"
        )
    if not candidates:
        raise CheckpointError(f"{run}: no checkpoint yet; train until the first one is saved")
    faults: list[str] = []
    for checkpoint in candidates:
        fault = find_fault(checkpoint)
        if fault is None:
            recipe = load_recipe(run / "recipe.yaml")
            return Source(run, checkpoint, recipe, read_state(checkpoint), tuple(faults))
        faults.append(f"{checkpoint.name}: {fault}")
    raise CheckpointError(
        f"{run}: no intact checkpoint to convert ({'; '.join(faults)}); restore one from a copy"
    )
