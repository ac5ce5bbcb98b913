"""Weights into a model that is built already, whatever its layout: each rank reads its own rows.

megatron-core's sharded state says, for every local tensor, which box of which stored tensor it is;
the box is copied from mapped files. No process group is used and nothing is whole in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

from megatron_curr.convert.published import PublishedWeights
from megatron_curr.convert.source import Source, open_source
from megatron_curr.convert.stored import weight_name
from megatron_curr.convert.weights import Weights
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

log = logging.getLogger(__name__)

VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
NewRows = Literal["mean", "random"]
_BLOCK_ROWS = 4096
# Settings of a model that say how it is trained or padded.
_FREE = {
    *("preset", "vocab_size", "make_vocab_size_divisible_by", "init_method_std"),
    *("moe_aux_loss_coeff", "moe_router_bias_update_rate", "max_position_embeddings"),
}
# What training on longer sequences changes on purpose.
_STRETCHED = {
    *("rotary_base", "rope_scaling_factor", "seq_len_interpolation_factor"),
    *("yarn_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"),
    *("yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim"),
}


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module],
    source: Source,
    *,
    groups: Groups,
    vocab_size: int,
    new_rows: NewRows | None = None,
) -> None:
    """Fill this rank's chunks. Call ``reload_model_params`` of an optimizer afterwards.

    ``vocab_size`` is the model's, without padding. Where it is larger than the source's,
    ``new_rows`` says what the tokens in between begin as: the mean of the rows there are, or the
    rows as the model was built. Rows that pad stay as built. Raises ``CheckpointError`` for
    another vocabulary, or a weight that is missing or of another shape.
    """
    _check_vocabulary(source, vocab_size, new_rows)
    means: dict[str, Tensor] = {}
    for chunk in chunks:
        state: dict[str, Any] = chunk.sharded_state_dict(
            metadata={"dp_cp_group": groups.pg_collection.dp_cp}
        )
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor):
                name, lead = weight_name(tensor.key, tensor.global_offset)
                _fill(tensor, source, name=name, lead=lead)
                if new_rows == "mean" and name in VOCABULARY:
                    if name not in means:
                        means[name] = _mean_row(source.weights, name, source.vocab_size)
                    _fill_rows(tensor, means[name], source.vocab_size, vocab_size)


def _check_vocabulary(source: Source, vocab_size: int, new_rows: NewRows | None) -> None:
    if vocab_size < source.vocab_size or (vocab_size > source.vocab_size and new_rows is None):
        raise CheckpointError(
            f"{source.path}: has {source.vocab_size:,} tokens and the recipe's model "
            f"{vocab_size:,}; use its tokenizer, or one that adds to it and set init_new_tokens"
        )


def _fill(tensor: ShardedTensor, source: Source, *, name: str, lead: int) -> None:
    """Copy the tensor's box, a few rows at a time; rows beyond the source's vocabulary stay."""
    weights = source.weights
    if name not in weights:
        raise CheckpointError(f"{source.path}: has no {name}; the recipe's model is another one")
    shape, whole = weights.shape(name), tuple(tensor.global_shape[lead:])
    known_rows = source.vocab_size if name in VOCABULARY else shape[0]
    if shape[1:] != whole[1:] or (known_rows != whole[0] and name not in VOCABULARY):
        raise CheckpointError(
            f"{source.path}: {name} is {shape} and in the recipe's model {whole}; take the model "
            "section of the model.yaml that `megatron-curr convert` makes of it"
        )
    offset = tensor.global_offset[lead:]
    local = tensor.data.view(tensor.data.shape[-len(whole) :])
    columns = tuple(
        slice(at, at + size) for at, size in zip(offset[1:], local.shape[1:], strict=True)
    )
    end = min(local.shape[0], known_rows - offset[0])
    for row in range(0, max(end, 0), _BLOCK_ROWS):
        last = min(row + _BLOCK_ROWS, end)
        rows = weights.read(name, offset[0] + row, offset[0] + last)
        local[row:last].copy_(rows[(slice(None), *columns)])


def _mean_row(weights: Weights, name: str, count: int) -> Tensor:
    total = torch.zeros(weights.shape(name)[1], dtype=torch.float64)
    for row in range(0, count, _BLOCK_ROWS):
        total += weights.read(name, row, min(row + _BLOCK_ROWS, count)).double().sum(dim=0)
    return total / count


def _fill_rows(tensor: ShardedTensor, row: Tensor, start: int, end: int) -> None:
    """Set the tensor's part of rows [start, end) of the vocabulary to ``row``."""
    first = tensor.global_offset[0]
    start, end = max(start - first, 0), min(end - first, tensor.data.shape[0])
    if start < end:
        tensor.data[start:end] = row.to(tensor.data.dtype)


def first_weights(
    recipe: Recipe | VideoRecipe, *, vocab_size: int
) -> Callable[[list[nn.Module], Groups], None] | None:
    """What fills a run's model before its first step; None where weights are drawn.

    Raises a ``UserError`` for a folder that is not there, damaged, or of another model.
    """
    if isinstance(recipe, VideoRecipe):
        from megatron_curr.convert.video_first_weights import video_first_weights  # reads this

        return video_first_weights(recipe)
    source = open_first_source(recipe)
    if source is None:
        return None
    _check_model(recipe.model, source)
    _check_vocabulary(source, vocab_size, recipe.init_new_tokens)
    if isinstance(source.weights, PublishedWeights):
        source.pieces(source.family())  # are its tensors what they should be?

    def fill(chunks: list[nn.Module], groups: Groups) -> None:
        load_weights(
            chunks, source, groups=groups, vocab_size=vocab_size, new_rows=recipe.init_new_tokens
        )
        log.info("first weights from %s, moments from zero", source.path)

    return fill


def open_first_source(recipe: Recipe) -> Source | None:
    """What ``init_from`` names; None without it. Raises a ``UserError`` for another kind of it."""
    if recipe.init_from is None:
        return None
    kind, _, name = recipe.init_from.partition(":")
    source = open_source(Path(name), which="ema" if kind == "ema" else "raw")
    if (kind == "hf") != isinstance(source.weights, PublishedWeights):
        other = "checkpoint" if kind == "hf" else "hf"
        raise RecipeError(f"init_from: {name} is no {kind} folder; write {other}:{name}")
    return source


def _check_model(model: Model, source: Source) -> None:
    """Settings that no shape shows: those that change what the weights compute are refused."""
    for name, value in source.model.model_dump().items():
        found = getattr(model, name)
        if found == value or name in _FREE:
            continue
        if name in _STRETCHED:
            log.warning("model.%s is %s, and %s in %s", name, found, value, source.path)
            continue
        raise RecipeError(
            f"model.{name}: found {found}; {source.path} was made with {value}: set that"
        )
