"""A checkpoint's video model on one rank, whatever layout saved it: raw weights or their average.

Weights are read from the checkpoint's chunks by name, so no rank that saved it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)
from megatron_curr.convert.source import find_run
from megatron_curr.convert.stored import StoredTensors, open_stored
from megatron_curr.errors import CheckpointError
from megatron_curr.models.video_dit import VideoDiT, build_video_dit_chunks
from megatron_curr.parallel.full_tensors import named_full_parameters
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups, one_rank
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.checkpoint_folder import list_checkpoints
from megatron_curr.training.optimizer_state import AVERAGE

Weights = Literal["auto", "ema", "raw"]


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What was loaded, and from where."""

    model: VideoDiT
    groups: Groups
    recipe: VideoRecipe
    checkpoint: Path
    weights: Weights  # never auto


@contextmanager
def trained_model(path: Path, *, weights: Weights = "auto") -> Iterator[TrainedModel]:
    """The model of a run's newest checkpoint, or of the checkpoint that ``path`` names.

    ``auto`` takes the average where the run kept one. Raises ``CheckpointError`` for a folder that
    is not there, a run of text, a checkpoint of another model, and an average that was not kept.
    """
    if not path.is_dir():
        known = ", ".join(other.name for other in list_checkpoints(path.parent))
        raise CheckpointError(
            f"{path}: no such folder; "
            + (f"beside it are {known}" if known else "give a run of video, or its checkpoint")
        )
    run, checkpoint = find_run(path)
    recipe = run.recipe
    if not isinstance(recipe, VideoRecipe):
        raise CheckpointError(f"{path}: is a run of text; sample needs one of video")
    stored, kind = _choose(checkpoint, weights)
    with one_rank():
        parallel = Parallel(micro_batch_tokens=recipe.parallel.micro_batch_tokens)
        groups = build_groups(parallel)
        try:
            precision = recipe.training.precision if groups.device.type == "cuda" else "fp32"
            (model,) = build_video_dit_chunks(
                recipe.model, parallel=parallel, precision=precision, groups=groups
            )
            _fill(model, stored)
            model.to(groups.device).eval()
            yield TrainedModel(model, groups, recipe, checkpoint, kind)
        finally:
            destroy_groups()


def _choose(checkpoint: Path, weights: Weights) -> tuple[StoredTensors, Weights]:
    averages = open_stored(checkpoint, prefix=f"optimizer.state.{AVERAGE}.")
    if weights == "raw" or (weights == "auto" and not averages.tensors):
        return open_stored(checkpoint), "raw"
    if not averages.tensors:
        raise CheckpointError(
            f"{checkpoint}: holds no average of the weights; use --weights raw, or train with "
            "training.ema_decay"
        )
    return averages, "ema"


@torch.no_grad()
def _fill(model: VideoDiT, stored: StoredTensors) -> None:
    for name, parameter in named_full_parameters(model):
        if stored.shape(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"{stored.checkpoint}: {name} is {stored.shape(name)} and in the recipe's model "
                f"{tuple(parameter.shape)}; was it saved with another recipe?"
            )
        parameter.copy_(stored.read(name))
