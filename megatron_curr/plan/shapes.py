"""The shapes of a run's micro-batches: one for text, one for each bucket of video."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from megatron_curr.curriculum.lots import VideoPlanner
from megatron_curr.errors import RecipeError
from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.dit import END_TOKENS
from megatron_curr.plan.flops import Ints, causal_keys, keys_in_documents, model_flops_per_token
from megatron_curr.plan.layout import padded_vocab_size
from megatron_curr.plan.video_flops import sample_flops
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

AnyRecipe = Recipe | VideoRecipe


@dataclass(frozen=True, slots=True)
class Shape:
    """Samples of one size, as a data-parallel rank takes them at a time."""

    batch: MicroBatch
    sample_tokens: int  # as the clock counts them
    flops_per_token: float  # of the model, both passes
    keys_per_token: float

    @property
    def micro_batch_tokens(self) -> int:
        """As the clock counts them."""
        return self.batch.num_samples * self.sample_tokens


def text_shape(
    recipe: Recipe,
    *,
    seq_length: int,
    vocab_size: int | None,
    is_fused: bool,
    document_tokens: Ints | None,
) -> Shape:
    """Raises ``RecipeError`` where neither the model nor ``vocab_size`` tells the vocabulary."""
    model, parallel = recipe.model, recipe.parallel
    known = model.vocab_size or vocab_size
    if known is None:
        raise RecipeError(
            "model.vocab_size: missing, and the tokenizer that would tell it is not here; give it"
        )
    padded = padded_vocab_size(known, model, parallel)
    keys = causal_keys(seq_length)
    if recipe.data.isolate_documents and document_tokens is not None:
        keys = keys_in_documents(document_tokens, seq_length)
    flops = model_flops_per_token(
        model, vocab_size=padded, seq_length=seq_length, keys_per_token=keys
    )
    batch = MicroBatch(
        model=model,
        parallel=parallel,
        vocab_size=padded,
        num_samples=parallel.micro_batch_tokens // seq_length,
        seq_length=seq_length,
        precision=recipe.training.precision,
        is_fused=is_fused,
        isolate_documents=recipe.data.isolate_documents,
        keeps_average=recipe.training.ema_decay is not None,
    )
    return Shape(batch, seq_length, flops, keys)


def video_shapes(recipe: VideoRecipe, *, is_fused: bool) -> dict[str, Shape]:
    """Of every cell, by its name ``source/bucket``."""
    model, parallel = recipe.model, recipe.parallel
    shapes = {}
    for cell in VideoPlanner(recipe).cells:
        tokens = cell.sample_tokens
        batch = MicroBatch(
            model=model,
            parallel=parallel,
            vocab_size=0,
            num_samples=max(parallel.micro_batch_tokens // tokens, 1),
            seq_length=tokens + END_TOKENS,
            precision=recipe.training.precision,
            is_fused=is_fused,
            isolate_documents=False,
            keeps_average=recipe.training.ema_decay is not None,
        )
        flops = sample_flops(model, num_patches=tokens, text_tokens=model.max_text_tokens) / tokens
        shapes[cell.name] = Shape(batch, tokens, flops, tokens + END_TOKENS)
    return shapes


def shares_of(
    tokens: Mapping[str, int], shapes: Mapping[str, Shape]
) -> Iterator[tuple[Shape, float]]:
    """Each shape of a phase with its share of the phase's tokens."""
    total = sum(tokens.values())
    for name, part in tokens.items():
        if part:
            yield shapes[name], part / total


def largest(shapes: Sequence[Shape]) -> Shape:
    """The one whose micro-batch is longest."""
    return max(shapes, key=lambda shape: shape.batch.tokens)
