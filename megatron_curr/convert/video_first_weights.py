"""The first weights of a video run: of another run, or of what `convert` made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from torch import nn

from megatron_curr.convert.load import load_weights
from megatron_curr.convert.video import model_section, open_video_source
from megatron_curr.errors import RecipeError
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.video_schema import VideoRecipe

log = logging.getLogger(__name__)
_OF_NO_WEIGHT = {"max_text_tokens", "round_timesteps"}  # the recipe's word goes


def video_first_weights(
    recipe: VideoRecipe,
) -> Callable[[list[nn.Module], Groups], None] | None:
    """What fills a run's model before its first step; None where weights are drawn.

    Raises ``CheckpointError`` for a folder without a checkpoint, ``RecipeError`` for one of another
    model.
    """
    if recipe.init_from is None:
        return None
    kind, _, name = recipe.init_from.partition(":")
    source = open_video_source(Path(name), which="ema" if kind == "ema" else "raw")
    wanted = model_section(recipe.model)
    for name, value in model_section(source.model).items():
        if wanted[name] != value and name not in _OF_NO_WEIGHT:
            raise RecipeError(
                f"model.{name}: found {wanted[name]}; {source.path} was made with {value}: set that"
            )

    def fill(chunks: list[nn.Module], groups: Groups) -> None:
        load_weights(chunks, source, groups=groups, vocab_size=0)
        log.info("first weights from %s, moments from zero", source.path)

    return fill
