"""GLM 4.5 and 4.6: ``Glm4MoeForCausalLM``. DeepSeek V3's experts behind plain attention."""

from __future__ import annotations

from dataclasses import replace

from megatron_curr.convert.deepseek_v3 import (
    EXPERT_BIAS,
    GROUPS_COMPUTED,
    GROUPS_READ,
    LAYERS_COMPUTED,
    LAYERS_READ,
    SECOND_TOKEN,
    SECOND_TOKEN_LAYER,
    SHARED_EXPERTS,
    read_groups,
    read_layers,
    write_groups,
    write_layers,
)
from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import (
    ATTENTION,
    FIXED,
    GATE_UP_DOWN,
    HEAD,
    INPUT_NORM,
    MLP,
    MLP_NORM,
    NAMES,
    QKV_BIASES,
    TAIL,
)
from megatron_curr.convert.mixtral import routed_experts
from megatron_curr.convert.qwen3 import QUERY_KEY_NORMS

FAMILY = Family(
    architecture="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    head=HEAD,
    layer=(
        INPUT_NORM,
        *ATTENTION,
        *(replace(bias, when=lambda model: model.add_qkv_bias) for bias in QKV_BIASES),
        *(replace(norm, when=lambda model: model.qk_layernorm) for norm in QUERY_KEY_NORMS),
        *MLP_NORM,
        *MLP,
        *routed_experts("mlp", GATE_UP_DOWN),
        EXPERT_BIAS,
        *SHARED_EXPERTS,
    ),
    tail=TAIL,
    names={
        **NAMES,
        "attention_bias": "add_qkv_bias",
        "use_qk_norm": "qk_layernorm",
        "n_routed_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
    },
    fixed={**FIXED, "norm_topk_prob": (True,)},
    requires={"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    computed=LAYERS_COMPUTED | GROUPS_COMPUTED,
    reads=LAYERS_READ | GROUPS_READ,
    harmless=SECOND_TOKEN,
    is_partly_rotated=True,
    ignored=SECOND_TOKEN_LAYER,
    write=lambda model: {**write_layers(model), **write_groups(model)},
    read=lambda config: {**read_layers(config), **read_groups(config)},
)
