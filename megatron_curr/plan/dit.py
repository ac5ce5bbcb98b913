"""Weights and activations of a video diffusion transformer, by its shape.

Its layers: full attention over the tokens of a clip, attention of every token to the text, an MLP
of two matrices, and modulation by the timestep (MUG-V; PixArt: Chen et al. 2023, arXiv:2310.00426).
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_curr.plan.activations import MicroBatch, norm_bytes
from megatron_curr.plan.model_size import Weight
from megatron_curr.recipe.video_model import VideoDiT

END_TOKENS = 2  # one before the first patch, one after the last


def dit_layer_bytes(batch: MicroBatch) -> int:
    """Kept of one layer for the backward pass: see ``models/dit_layer.py``.

    Each of the two modulated norms keeps its input, its output and the modulated one, each gate its
    branch; the norm before the text is kept in fp32 beside its output. Queries and keys are kept
    as they are projected, normed and rotated, those of the text beside them.
    """
    model, size = batch.model, batch.element_bytes
    width = model.num_attention_heads * model.kv_channels // batch.tp_size
    heads = model.num_attention_heads // batch.tp_size
    hidden = batch.sharded_tokens * (model.hidden_size * (9 * size + 4) + 3 * 8)
    norms = 3 * norm_bytes(batch, batch.tokens * heads, model.kv_channels)
    attention = batch.tokens * (width * size * 9 + 2 * 4 * heads) + norms
    if batch.recomputes("mlp"):
        return hidden + attention
    mlp = batch.tokens * size * 2 * model.ffn_hidden_size // batch.tp_size
    return hidden + attention + mlp


def dit_parameters(model: VideoDiT) -> int:
    """Exact number of weights."""
    weights = [*dit_input_weights(model), *conditioning_weights(model), *dit_output_weights(model)]
    layer = sum(weight.size for weight in dit_layer_weights(model))
    return sum(weight.size for weight in weights) + model.num_layers * layer


def dit_layer_weights(model: VideoDiT) -> Iterator[Weight]:
    """The weights of one layer."""
    hidden, channels = model.hidden_size, model.kv_channels
    width = model.num_attention_heads * channels
    for name, outputs in (("linear_qkv", 3 * width), ("text_q", width), ("text_kv", 2 * width)):
        yield Weight(name, outputs, hidden, "tensor")
        yield Weight(f"{name}_bias", outputs, cut="tensor")
    for name in ("linear_proj", "text_proj"):
        yield Weight(name, hidden, width, "tensor")
        yield Weight(f"{name}_bias", hidden)
    yield Weight("query_key_norms", 4 * channels)
    yield Weight("pre_cross_attn_layernorm", 2 * hidden)
    yield Weight("mlp_fc1", model.ffn_hidden_size, hidden, "tensor")
    yield Weight("mlp_fc1_bias", model.ffn_hidden_size, cut="tensor")
    yield Weight("mlp_fc2", hidden, model.ffn_hidden_size, "tensor")
    yield Weight("mlp_fc2_bias", hidden)
    yield Weight("scale_shift_table", 6, hidden)


def conditioning_weights(model: VideoDiT) -> Iterator[Weight]:
    """Embedders of timestep, frame rate and text, which every pipeline stage holds whole."""
    hidden, frequencies = model.hidden_size, model.timestep_frequencies
    for name, inputs in (
        ("timestep_embedder", frequencies),
        ("fps_embedder", frequencies),
        ("context_embedder", model.text_hidden_size),
    ):
        yield Weight(f"{name}_in", hidden, inputs)
        yield Weight(f"{name}_out", hidden, hidden)
        yield Weight(f"{name}_biases", 2 * hidden)
    yield Weight("timestep_block", 6 * hidden, hidden)
    yield Weight("timestep_block_bias", 6 * hidden)


def dit_input_weights(model: VideoDiT) -> Iterator[Weight]:
    """In front of the first layer: patches to tokens, and the two end tokens."""
    yield Weight("x_embedder", model.hidden_size, model.in_channels * model.patch_volume)
    yield Weight("x_embedder_bias", model.hidden_size)
    yield Weight("end_tokens", END_TOKENS * model.hidden_size)


def dit_output_weights(model: VideoDiT) -> Iterator[Weight]:
    """Behind the last layer: modulation, and tokens to patches."""
    outputs = model.out_channels * model.patch_volume
    yield Weight("final_scale_shift_table", 2, model.hidden_size)
    yield Weight("final_linear", outputs, model.hidden_size)
    yield Weight("final_linear_bias", outputs)
