"""Qwen 2 and 2.5, dense: ``Qwen2ForCausalLM``. Llama with biases of queries, keys and values."""

from megatron_curr.convert.family import Family, key_rows, query_rows, value_rows
from megatron_curr.convert.llama import HEAD, LAYER, TAIL, layer_entry

_BIAS = "self_attention.linear_qkv.bias"

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    entries=(
        *HEAD,
        *LAYER,
        layer_entry("self_attn.q_proj.bias", _BIAS, query_rows),
        layer_entry("self_attn.k_proj.bias", _BIAS, key_rows),
        layer_entry("self_attn.v_proj.bias", _BIAS, value_rows),
        *TAIL,
    ),
    # Without a head_dim of its own: that is the hidden size over the heads.
    fits=lambda model: (
        model.add_qkv_bias
        and not model.qk_layernorm
        and model.kv_channels * model.num_attention_heads == model.hidden_size
    ),
    config_fields=lambda model: {"use_sliding_window": False},
)
