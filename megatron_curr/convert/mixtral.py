"""Mixtral: ``MixtralForCausalLM``. Mistral with experts in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Entry, Family, WidthOf, all_rows, hidden
from megatron_curr.convert.llama import (
    ATTENTION,
    FIXED,
    HEAD,
    INPUT_NORM,
    MLP_NORM,
    NAMES,
    TAIL,
    gated_mlp,
    layer_entry,
)
from megatron_curr.convert.windows import WINDOW, WINDOW_SETTINGS, read_window, write_window
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.model import Model


def expert_width(model: Model) -> int:
    """Width of one expert."""
    return model.expert_ffn_hidden_size


def num_experts(model: Model) -> int:
    """Rows of the router."""
    return model.num_moe_experts or 0


def routed_experts(published: str, names: tuple[str, str, str]) -> tuple[Entry, ...]:
    """The router and the experts, published under ``published``."""
    width: WidthOf = expert_width
    stored = "mlp.experts.experts.{expert}"
    return (
        layer_entry(
            f"{published}.gate.weight",
            "mlp.router.weight",
            all_rows(num_experts),
            hidden,
            "sparse",
        ),
        *gated_mlp(published + ".experts.{expert}", stored, width, where="sparse", names=names),
    )


def write_experts(model: Model) -> dict[str, Any]:
    """Experts in every layer, of one width. Raises ``RecipeError`` where they are not."""
    if not all(model.moe_layers):
        raise RecipeError("moe_layer_freq leaves layers without experts, there all have them")
    return {"intermediate_size": model.expert_ffn_hidden_size, **write_window(model)}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**read_window(config), "moe_ffn_hidden_size": config["intermediate_size"]}


FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    head=HEAD,
    layer=(
        INPUT_NORM,
        *ATTENTION,
        *MLP_NORM,
        *routed_experts("block_sparse_moe", ("w1", "w3", "w2")),
    ),
    tail=TAIL,
    names={
        **NAMES,
        "num_local_experts": "num_moe_experts",
        "num_experts_per_tok": "moe_router_topk",
        "router_aux_loss_coef": "moe_aux_loss_coeff",
    },
    fixed=FIXED,
    computed=WINDOW_SETTINGS | {"moe_ffn_hidden_size", "moe_layer_freq"},
    reads=WINDOW | {"intermediate_size"},
    harmless={"router_jitter_noise": "moves the router's input while training"},
    write=write_experts,
    read=_read,
)
