"""OLMo 2: ``Olmo2ForCausalLM``. Llama with norms behind the blocks and over whole projections."""

from __future__ import annotations

from megatron_curr.convert.family import Family, all_rows, hidden, key_width, query_width
from megatron_curr.convert.llama import (
    ATTENTION,
    FIXED,
    HEAD,
    MLP,
    NAMES,
    TAIL,
    layer_entry,
)
from megatron_curr.convert.qwen2 import plain_heads

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    head=HEAD,
    layer=(
        *ATTENTION,
        layer_entry(
            "self_attn.q_norm.weight",
            "self_attention.q_layernorm.weight",
            all_rows(query_width),
        ),
        layer_entry(
            "self_attn.k_norm.weight", "self_attention.k_layernorm.weight", all_rows(key_width)
        ),
        layer_entry(
            "post_attention_layernorm.weight",
            "self_attention.linear_proj.post_norm.weight",
            all_rows(hidden),
        ),
        *MLP,
        layer_entry(
            "post_feedforward_layernorm.weight",
            "mlp.linear_fc2.post_norm.weight",
            all_rows(hidden),
        ),
    ),
    tail=TAIL,
    names=NAMES,
    fixed={**FIXED, "attention_bias": (False,)},
    requires={
        "norm_position": "after",
        "qk_layernorm": True,
        "qk_layernorm_over": "projection",
    },
    write=plain_heads,
)
