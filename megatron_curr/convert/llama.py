"""Llama: ``LlamaForCausalLM``. Qwen's tables are this one with a few rows more."""

from megatron_curr.convert.family import (
    Entry,
    Family,
    RowsOf,
    gate_rows,
    key_rows,
    query_rows,
    up_rows,
    value_rows,
)

HEAD = (Entry("model.embed_tokens.weight", "embedding.word_embeddings.weight", is_vocabulary=True),)
TAIL = (
    Entry("model.norm.weight", "decoder.final_layernorm.weight"),
    Entry("lm_head.weight", "output_layer.weight", is_vocabulary=True, untied_only=True),
)
_FUSED_QKV, _FUSED_UP = "self_attention.linear_qkv", "mlp.linear_fc1"


def layer_entry(published: str, stored: str, rows: RowsOf | None = None) -> Entry:
    """A tensor that every layer has, by its names inside the layer."""
    return Entry(
        f"model.layers.{{layer}}.{published}", f"decoder.layers.{stored}", rows, per_layer=True
    )


LAYER = (
    layer_entry("input_layernorm.weight", f"{_FUSED_QKV}.layer_norm_weight"),
    layer_entry("self_attn.q_proj.weight", f"{_FUSED_QKV}.weight", query_rows),
    layer_entry("self_attn.k_proj.weight", f"{_FUSED_QKV}.weight", key_rows),
    layer_entry("self_attn.v_proj.weight", f"{_FUSED_QKV}.weight", value_rows),
    layer_entry("self_attn.o_proj.weight", "self_attention.linear_proj.weight"),
    layer_entry("post_attention_layernorm.weight", f"{_FUSED_UP}.layer_norm_weight"),
    layer_entry("mlp.gate_proj.weight", f"{_FUSED_UP}.weight", gate_rows),
    layer_entry("mlp.up_proj.weight", f"{_FUSED_UP}.weight", up_rows),
    layer_entry("mlp.down_proj.weight", "mlp.linear_fc2.weight"),
)

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    entries=(*HEAD, *LAYER, *TAIL),
    fits=lambda model: not model.qk_layernorm and not model.add_qkv_bias,
    config_fields=lambda model: {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
)
