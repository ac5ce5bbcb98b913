"""GLM 4 of 2025: ``Glm4ForCausalLM``; of 2024: ``GlmForCausalLM``, with norms before blocks alone.

Half of every head is rotated, neighbours with each other.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_curr.convert.family import Family, all_rows, hidden
from megatron_curr.convert.llama import (
    ATTENTION,
    FIXED,
    HEAD,
    INPUT_NORM,
    MLP_NORM,
    NAMES,
    QKV_BIASES,
    TAIL,
    layer_entry,
)
from megatron_curr.convert.phi3 import FUSED_MLP

_BEFORE = (
    INPUT_NORM,
    *ATTENTION,
    *(replace(bias, when=lambda model: model.add_qkv_bias) for bias in QKV_BIASES),
    *MLP_NORM,
    *FUSED_MLP,
)

GLM = Family(
    architecture="GlmForCausalLM",
    model_type="glm",
    head=HEAD,
    layer=_BEFORE,
    tail=TAIL,
    names={**NAMES, "attention_bias": "add_qkv_bias"},
    fixed=FIXED,
    requires={"rotary_interleaved": True},
    is_partly_rotated=True,
)
FAMILY = replace(
    GLM,
    architecture="Glm4ForCausalLM",
    model_type="glm4",
    layer=(
        *_BEFORE,
        layer_entry(
            "post_self_attn_layernorm.weight",
            "self_attention.linear_proj.post_norm.weight",
            all_rows(hidden),
        ),
        layer_entry(
            "post_mlp_layernorm.weight", "mlp.linear_fc2.post_norm.weight", all_rows(hidden)
        ),
    ),
    requires={"rotary_interleaved": True, "norm_position": "both"},
)
