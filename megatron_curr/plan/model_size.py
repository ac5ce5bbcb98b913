"""Every weight of a model and how it is split, in closed form, from the recipe alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_curr.recipe.model import Model

Cut = Literal["tensor", "experts", "whole"]
"""Split over tensor ranks; over expert and expert-tensor ranks; held whole by every rank."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter tensor, or ``count`` alike, as large as it is before anything is split."""

    name: str
    outputs: int
    inputs: int | None = None  # None: a vector
    cut: Cut = "whole"
    count: int = 1

    @property
    def size(self) -> int:
        """Numbers in it."""
        return self.count * self.outputs * (1 if self.inputs is None else self.inputs)


def num_parameters(model: Model, *, vocab_size: int) -> int:
    """Exact number of weights; ``vocab_size`` as it is stored (a Hugging Face export: unpadded)."""
    return sum(weight.size for weight in _all_weights(model, vocab_size=vocab_size))


def num_active_parameters(model: Model, *, vocab_size: int) -> int:
    """Weights that one token meets: all of them, save the experts it is not sent to."""
    return sum(active_size(weight, model) for weight in _all_weights(model, vocab_size=vocab_size))


def active_size(weight: Weight, model: Model) -> int:
    """Numbers of it that one token meets."""
    if weight.cut != "experts":
        return weight.size
    return weight.size * model.moe_router_topk // weight.count


def layer_weights(model: Model, *, has_experts: bool) -> Iterator[Weight]:
    """Of one transformer layer; norms stand before attention and MLP, or after, or both."""
    yield from _norm("attention_norm", model.hidden_size, model)
    if model.norm_position == "both":
        yield from _norm("attention_norm_after", model.hidden_size, model)
        yield from _norm("mlp_norm_after", model.hidden_size, model)
    latent = model.has_latent_attention
    yield from _latent_attention_weights(model) if latent else _attention_weights(model)
    if not model.shared_residual_norm:
        yield from _norm("mlp_norm", model.hidden_size, model)
    yield from (
        _expert_weights(model) if has_experts else _mlp_weights("mlp", model.ffn_hidden_size, model)
    )


def embedding_weights(model: Model, *, vocab_size: int) -> Iterator[Weight]:
    """The table in front of the first layer."""
    yield Weight("embedding", vocab_size, model.hidden_size, "tensor")


def output_weights(model: Model, *, vocab_size: int) -> Iterator[Weight]:
    """The norm and, where it is no other one, the table behind the last layer."""
    yield from _norm("final_norm", model.hidden_size, model)
    if model.untie_embeddings_and_output_weights:
        yield Weight("output_layer", vocab_size, model.hidden_size, "tensor")


def score_width(model: Model) -> int:
    """Multiplications of one query-key pair in attention: of scores and of values, all heads."""
    if model.has_latent_attention:
        per_head = model.qk_head_dim + model.qk_pos_emb_head_dim + model.v_head_dim
        return model.num_attention_heads * per_head
    return 2 * model.num_attention_heads * model.kv_channels


def _all_weights(model: Model, *, vocab_size: int) -> Iterator[Weight]:
    yield from embedding_weights(model, vocab_size=vocab_size)
    for has_experts in model.moe_layers:
        yield from layer_weights(model, has_experts=has_experts)
    yield from output_weights(model, vocab_size=vocab_size)


def _norm(name: str, width: int, model: Model) -> Iterator[Weight]:
    yield Weight(name, width)
    if model.normalization == "LayerNorm" and model.layernorm_bias:
        yield Weight(f"{name}_bias", width)


def _attention_weights(model: Model) -> Iterator[Weight]:
    channels = model.kv_channels
    query_width = model.num_attention_heads * channels
    key_width = model.num_query_groups * channels
    width = query_width + 2 * key_width
    yield Weight("linear_qkv", width, model.hidden_size, "tensor")
    if model.add_qkv_bias or model.linear_biases == "all":
        yield Weight("linear_qkv_bias", width, cut="tensor")
    if model.qk_layernorm and model.qk_layernorm_over == "head":
        yield from _norm("q_layernorm", channels, model)
        yield from _norm("k_layernorm", channels, model)
    elif model.qk_layernorm:
        yield Weight("q_layernorm", query_width, cut="tensor")
        yield Weight("k_layernorm", key_width, cut="tensor")
    yield from _into_residual("linear_proj", query_width, model)


def _latent_attention_weights(model: Model) -> Iterator[Weight]:
    """Multi-latent attention (DeepSeek-V2, arXiv:2405.04434): down-projections are not cut."""
    assert model.kv_lora_rank is not None
    hidden, heads = model.hidden_size, model.num_attention_heads
    query_width = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    if model.q_lora_rank:
        yield Weight("linear_q_down_proj", model.q_lora_rank, hidden)
        yield Weight("q_layernorm", model.q_lora_rank)
        yield Weight("linear_q_up_proj", query_width, model.q_lora_rank, "tensor")
    else:
        yield Weight("linear_q_proj", query_width, hidden, "tensor")
    yield Weight("linear_kv_down_proj", model.kv_lora_rank + model.qk_pos_emb_head_dim, hidden)
    yield Weight("kv_layernorm", model.kv_lora_rank)
    key_value_width = heads * (model.qk_head_dim + model.v_head_dim)
    yield Weight("linear_kv_up_proj", key_value_width, model.kv_lora_rank, "tensor")
    yield from _into_residual("linear_proj", heads * model.v_head_dim, model)


def _mlp_weights(name: str, width: int, model: Model) -> Iterator[Weight]:
    into = 2 * width if model.is_gated else width
    yield Weight(f"{name}_fc1", into, model.hidden_size, "tensor")
    if model.linear_biases == "all":
        yield Weight(f"{name}_fc1_bias", into, cut="tensor")
    yield from _into_residual(f"{name}_fc2", width, model)


def _into_residual(name: str, width: int, model: Model) -> Iterator[Weight]:
    yield Weight(name, model.hidden_size, width, "tensor")
    if model.linear_biases != "none":
        yield Weight(f"{name}_bias", model.hidden_size)


def _expert_weights(model: Model) -> Iterator[Weight]:
    assert model.num_moe_experts is not None
    hidden, count, width = model.hidden_size, model.num_moe_experts, model.expert_ffn_hidden_size
    into = 2 * width if model.is_gated else width
    yield Weight("router", count, hidden)
    yield Weight("experts_fc1", into, hidden, "experts", count)
    yield Weight("experts_fc2", hidden, width, "experts", count)
    if model.moe_shared_expert_intermediate_size:
        yield from _mlp_weights("shared_experts", model.moe_shared_expert_intermediate_size, model)
