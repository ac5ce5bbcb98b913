"""What language and video models differ in, for the parts of a plan that treat them alike."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_curr.plan import dit
from megatron_curr.plan.activations import (
    MicroBatch,
    checkpoint_bytes,
    embedding_bytes,
    layer_bytes,
    loss_bytes,
)
from megatron_curr.plan.flops import (
    keys_of_layer,
    layer_flops_per_token,
    output_flops_per_token,
    recomputed_flops_per_token,
)
from megatron_curr.plan.layout import Stage
from megatron_curr.plan.model_size import (
    Weight,
    embedding_weights,
    layer_weights,
    output_weights,
    score_width,
)
from megatron_curr.plan.video_flops import layer_flops
from megatron_curr.recipe.model import Model


def stage_weights(batch: MicroBatch, stage: Stage) -> Iterator[Weight]:
    """The weights of a pipeline stage, before they are split over its ranks."""
    model = batch.model
    if not isinstance(model, Model):
        yield from dit.conditioning_weights(model)
        if stage.has_embedding:
            yield from dit.dit_input_weights(model)
        for _ in stage.layers:
            yield from dit.dit_layer_weights(model)
        if stage.has_output:
            yield from dit.dit_output_weights(model)
        return
    if stage.has_embedding:
        yield from embedding_weights(model, vocab_size=batch.vocab_size)
    for layer in stage.layers:
        yield from layer_weights(model, has_experts=model.moe_layers[layer])
    if stage.has_output:
        yield from output_weights(model, vocab_size=batch.vocab_size)
        if not model.untie_embeddings_and_output_weights and not stage.has_embedding:
            # A copy, kept equal.
            yield from embedding_weights(model, vocab_size=batch.vocab_size)


def kept_of_layer(batch: MicroBatch, layer: int) -> int:
    """Bytes kept of a layer that is not recomputed as a whole."""
    if isinstance(batch.model, Model):
        return layer_bytes(batch, has_experts=batch.has_experts(layer))
    return dit.dit_layer_bytes(batch)


def kept_of_input(batch: MicroBatch) -> int:
    """Bytes kept in front of the first layer."""
    return embedding_bytes(batch) if isinstance(batch.model, Model) else 0


def kept_of_output(batch: MicroBatch) -> int:
    """Bytes kept behind the last layer."""
    if isinstance(batch.model, Model):
        return loss_bytes(batch)
    # A modulated norm, what it gives to the last matrix, and the prediction in fp32.
    numbers = 4 * batch.model.out_channels * batch.model.patch_volume
    return 3 * checkpoint_bytes(batch) + batch.tokens * numbers


def layer_forward_flops(batch: MicroBatch, layer: int, *, keys_per_token: float) -> float:
    """Of one token in one layer."""
    model = batch.model
    if isinstance(model, Model):
        keys = keys_of_layer(
            model, layer, keys_per_token=keys_per_token, seq_length=batch.seq_length
        )
        return layer_flops_per_token(
            model, has_experts=batch.has_experts(layer), keys_per_token=keys
        )
    clip = layer_flops(model, tokens=batch.seq_length, text_tokens=model.max_text_tokens)
    return clip / batch.seq_length


def attention_forward_flops(batch: MicroBatch, *, keys_per_token: float) -> float:
    """Of one token in one layer, scores and values alone."""
    model = batch.model
    if isinstance(model, Model):
        return 2 * score_width(model) * keys_per_token
    return 4.0 * model.num_attention_heads * model.kv_channels * batch.seq_length


def layer_recomputed_flops(
    batch: MicroBatch, layer: int, *, place_in_chunk: int, keys_per_token: float
) -> float:
    """Of one token, what recomputing the layer adds."""
    model, parallel = batch.model, batch.parallel
    if isinstance(model, Model):
        return recomputed_flops_per_token(
            model,
            parallel,
            place_in_chunk=place_in_chunk,
            has_experts=batch.has_experts(layer),
            keys_per_token=keys_per_token,
        )
    if parallel.recompute_granularity == "full":
        kept = parallel.recompute_method == "block"
        if not kept or place_in_chunk < (parallel.recompute_num_layers or 1):
            return layer_forward_flops(batch, layer, keys_per_token=keys_per_token)
    elif batch.recomputes("mlp"):
        return 4.0 * model.hidden_size * model.ffn_hidden_size
    elif batch.recomputes("core_attn"):
        return attention_forward_flops(batch, keys_per_token=keys_per_token)
    return 0.0


def output_forward_flops(batch: MicroBatch) -> float:
    """Of one token behind the last layer."""
    model = batch.model
    if isinstance(model, Model):
        return output_flops_per_token(model, vocab_size=batch.vocab_size)
    return 2.0 * model.hidden_size * model.out_channels * model.patch_volume
