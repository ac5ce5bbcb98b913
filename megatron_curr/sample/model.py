"""A video model on one rank, of whatever `convert` reads: raw weights or their average.

Weights are read by name from a checkpoint's chunks or a published file, so no rank is needed that
saved them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)
from megatron_curr.convert.source import AVERAGED, Source, open_weights
from megatron_curr.convert.video import is_video, open_video_source
from megatron_curr.convert.weights import Weights as Stored
from megatron_curr.errors import CheckpointError
from megatron_curr.models.video_dit import VideoDiT, build_video_dit_chunks
from megatron_curr.parallel.full_tensors import named_full_parameters
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups, one_rank
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.video_model import VideoDiT as Settings
from megatron_curr.recipe.video_schema import Objective, VideoRecipe
from megatron_curr.training.checkpoint_folder import list_checkpoints

Weights = Literal["auto", "ema", "raw"]


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What was loaded, and from where."""

    model: VideoDiT
    groups: Groups
    settings: Settings
    recipe: VideoRecipe | None
    """None of a model that is no run."""
    checkpoint: Path
    weights: Weights  # never auto

    @property
    def objective(self) -> Objective:
        """What it was trained for; MUG-V's where no recipe says."""
        return self.recipe.objective if self.recipe else Objective()


@contextmanager
def trained_model(path: Path, *, weights: Weights = "auto") -> Iterator[TrainedModel]:
    """The model of a run's newest checkpoint, or of the checkpoint or published model ``path`` is.

    ``auto`` takes the average where a run kept one. Raises ``CheckpointError`` for a place that is
    not there, a model of text, a checkpoint of another model, and an average that was not kept.
    """
    source, kind = _open(path, weights)
    run = source.run
    recipe = run.recipe if run else None
    assert recipe is None or isinstance(recipe, VideoRecipe)
    with one_rank():
        parallel = Parallel(micro_batch_tokens=1)  # samples are not trained on
        groups = build_groups(parallel)
        try:
            precision = "fp32"
            if groups.device.type == "cuda":
                stored = source.weights.dtype("x_embedder.proj.weight")
                of_file = "fp32" if stored is torch.float32 else "bf16"
                precision = recipe.training.precision if recipe else of_file
            (model,) = build_video_dit_chunks(
                source.model, parallel=parallel, precision=precision, groups=groups
            )
            _fill(model, source.weights, source.path)
            model.to(groups.device).eval()
            yield TrainedModel(model, groups, source.model, recipe, source.path, kind)
        finally:
            destroy_groups()


def _open(path: Path, weights: Weights) -> tuple[Source, Weights]:
    if not path.exists():
        known = ", ".join(other.name for other in list_checkpoints(path.parent))
        raise CheckpointError(
            f"{path}: no such folder; "
            + (f"beside it are {known}" if known else "give a run of video, or its checkpoint")
        )
    if not is_video(path):
        raise CheckpointError(
            f"{path}: is no model of video; sample needs a run of video, one of its checkpoints, "
            "or what `convert` reads (dit.pt, safetensors with a config, a converted checkpoint)"
        )
    if weights == "auto":
        source = open_video_source(path)
        if source.run is None or source.run.recipe.training.ema_decay is None:
            return source, "raw"
        return replace(source, weights=open_weights(source.path, "ema"), made_by=AVERAGED), "ema"
    return open_video_source(path, which=weights), weights


@torch.no_grad()
def _fill(model: VideoDiT, stored: Stored, checkpoint: Path) -> None:
    for name, parameter in named_full_parameters(model):
        if stored.shape(name) != tuple(parameter.shape):
            raise CheckpointError(
                f"{checkpoint}: {name} is {stored.shape(name)} and in the recipe's model "
                f"{tuple(parameter.shape)}; was it saved with another recipe?"
            )
        parameter.copy_(stored.read(name))
