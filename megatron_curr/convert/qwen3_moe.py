"""Qwen 3 with experts: ``Qwen3MoeForCausalLM``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    TAIL,
)
from megatron_curr.convert.mixtral import routed_experts
from megatron_curr.convert.qwen3 import QUERY_KEY_NORMS
from megatron_curr.convert.windows import WINDOW, WINDOW_SETTINGS, read_window, write_window
from megatron_curr.recipe.model import Model


def _write(model: Model) -> dict[str, Any]:
    return {
        # Version 4 of transformers reads the first, 5 writes the second.
        "num_experts": model.num_moe_experts,
        "num_local_experts": model.num_moe_experts,
        "moe_intermediate_size": model.expert_ffn_hidden_size,
        "norm_topk_prob": not model.moe_router_pre_softmax,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, sparse in enumerate(model.moe_layers) if not sparse],
        "use_sliding_window": model.window_size is not None,
        **write_window(model),
    }


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    dense, step = config.get("mlp_only_layers") or [], config["decoder_sparse_step"]
    layers = range(config["num_hidden_layers"])
    sparse = [int(layer not in dense and (layer + 1) % step == 0) for layer in layers]
    return {
        **read_window(config),
        # Version 5 of transformers saves the first; 4 knows the second alone.
        "num_moe_experts": config.get("num_local_experts") or config["num_experts"],
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_router_pre_softmax": not config["norm_topk_prob"],
        "moe_layer_freq": 1 if all(sparse) else sparse,
    }


FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    head=HEAD,
    layer=(
        INPUT_NORM,
        *ATTENTION,
        *QUERY_KEY_NORMS,
        *MLP_NORM,
        *MLP,
        *routed_experts("mlp", GATE_UP_DOWN),
    ),
    tail=TAIL,
    names={
        **NAMES,
        "num_experts_per_tok": "moe_router_topk",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    fixed={**FIXED, "attention_bias": (False,)},
    requires={"qk_layernorm": True},
    computed=WINDOW_SETTINGS
    | {"num_moe_experts", "moe_ffn_hidden_size", "moe_router_pre_softmax", "moe_layer_freq"},
    reads=WINDOW
    | {
        *("num_experts", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"),
        *("mlp_only_layers", "use_sliding_window"),
    },
    write=_write,
    read=_read,
)
