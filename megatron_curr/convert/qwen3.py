"""Qwen 3, dense: ``Qwen3ForCausalLM``. Llama with norms of every head's queries and keys."""

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import HEAD, LAYER, TAIL, layer_entry

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    entries=(
        *HEAD,
        *LAYER,
        layer_entry("self_attn.q_norm.weight", "self_attention.q_layernorm.weight"),
        layer_entry("self_attn.k_norm.weight", "self_attention.k_layernorm.weight"),
        *TAIL,
    ),
    fits=lambda model: model.qk_layernorm and not model.add_qkv_bias,
    config_fields=lambda model: {"attention_bias": False, "use_sliding_window": False},
)
