"""Parameters and arithmetic of a model in closed form, from the recipe alone."""

from __future__ import annotations

from megatron_curr.recipe.model import Model


def num_parameters(model: Model, *, vocab_size: int) -> int:
    """Exact number of weights; ``vocab_size`` as it is stored (a Hugging Face export: unpadded)."""
    return _count(model, vocab_size=vocab_size, experts=model.num_moe_experts or 0)


def num_active_parameters(model: Model, *, vocab_size: int) -> int:
    """Weights that one token meets: all of them, save the experts it is not sent to."""
    return _count(model, vocab_size=vocab_size, experts=model.moe_router_topk)


def _count(model: Model, *, vocab_size: int, experts: int) -> int:
    tables = 2 if model.untie_embeddings_and_output_weights else 1
    final_norm = model.hidden_size
    return (
        tables * vocab_size * model.hidden_size
        + _matrices(model, experts=experts)
        + model.num_layers * _layer_vectors(model)
        + final_norm
    )


def model_flops_per_token(model: Model, *, vocab_size: int, seq_length: int) -> int:
    """FLOPs that training one token needs, forwards and backwards, at this sequence length.

    6 for every weight of a matrix product (2 forwards, 4 backwards; the embedding is a lookup and
    costs none, the output layer does) plus 12 x layers x heads x head dim x sequence length for
    attention. Recomputed activations do not count, and neither does the half of the scores that a
    causal mask discards, so the number compares with published utilisations: Chowdhery et al.,
    "PaLM", 2022, appendix B; Narayanan et al., "Efficient large-scale language model training on
    GPU clusters", 2021, equation 3 (without its recompute). Of the experts only those that the
    token is sent to are counted.
    """
    matrices = _matrices(model, experts=model.moe_router_topk) + vocab_size * model.hidden_size
    query_width = model.num_attention_heads * model.kv_channels
    return 6 * matrices + 12 * model.num_layers * query_width * seq_length


def _matrices(model: Model, *, experts: int) -> int:
    """Of all layers, counting this many routed experts where a layer has them."""
    query_width = model.num_attention_heads * model.kv_channels
    key_value_width = 2 * model.num_query_groups * model.kv_channels
    attention = (
        model.hidden_size * (query_width + key_value_width) + query_width * model.hidden_size
    )
    gate_up_down = 3 * model.hidden_size
    sparse = sum(model.moe_layers)
    total = model.num_layers * attention
    total += (model.num_layers - sparse) * gate_up_down * model.ffn_hidden_size
    if sparse:
        assert model.num_moe_experts is not None
        router = model.hidden_size * model.num_moe_experts
        width = experts * model.expert_ffn_hidden_size
        width += model.moe_shared_expert_intermediate_size or 0
        total += sparse * (router + gate_up_down * width)
    return total


def _layer_vectors(model: Model) -> int:
    """Two norms; where asked for, norms of queries and keys and biases of their projection."""
    count = 2 * model.hidden_size
    if model.qk_layernorm:
        count += 2 * model.kv_channels
    if model.add_qkv_bias:
        count += (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
    return count
