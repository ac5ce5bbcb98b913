"""DeepSeek V2 Lite and its like: ``DeepseekV2ForCausalLM``. V3 with a softmax over all experts."""

from __future__ import annotations

from dataclasses import replace

from megatron_curr.convert import deepseek_v3
from megatron_curr.convert.deepseek_v3 import (
    LATENT_ATTENTION,
    LAYERS_COMPUTED,
    LAYERS_READ,
    SHARED_EXPERTS,
    read_latent,
    read_layers,
    write_latent,
    write_layers,
)
from megatron_curr.convert.llama import FIXED, GATE_UP_DOWN, MLP, MLP_NORM
from megatron_curr.convert.mixtral import routed_experts

FAMILY = replace(
    deepseek_v3.FAMILY,
    architecture="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    layer=(
        *LATENT_ATTENTION,
        *MLP_NORM,
        *MLP,
        *routed_experts("mlp", GATE_UP_DOWN),
        *SHARED_EXPERTS,
    ),
    fixed={
        **FIXED,
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        # V2 itself scores a group by its best expert, megatron-core by its best two.
        "topk_method": ("greedy",),
        "moe_layer_freq": (1,),
    },
    requires={"moe_router_pre_softmax": True},
    computed=LAYERS_COMPUTED | {"latent_layernorm_epsilon"},
    reads=LAYERS_READ,
    harmless={
        "n_group": "topk_method 'greedy' has no groups",
        "topk_group": "topk_method 'greedy' has no groups",
        "head_dim": "is qk_rope_head_dim",
    },
    write=lambda model: {**write_layers(model), **write_latent(model)},
    read=lambda config: {**read_layers(config), **read_latent(config)},
)
