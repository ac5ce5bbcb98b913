"""DeepSeek V3: ``DeepseekV3ForCausalLM``. Latent attention, shared experts, a router's bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Family, all_rows, hidden
from megatron_curr.convert.llama import (
    FIXED,
    GATE_UP_DOWN,
    HEAD,
    MLP,
    MLP_NORM,
    NAMES,
    TAIL,
    gated_mlp,
    layer_entry,
)
from megatron_curr.convert.mixtral import num_experts, routed_experts
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.model import Model

_OURS = "self_attention."
# Of the norms of latent queries, keys and values, whatever rms_norm_eps says: so the published
# code, and transformers.
_LATENT_EPSILON = 1e-6


def _compressed(model: Model) -> bool:
    return model.q_lora_rank is not None


def _plain(model: Model) -> bool:
    return model.q_lora_rank is None


def _query_rank(model: Model) -> int:
    return model.q_lora_rank or 0


def _key_value_rank(model: Model) -> int:
    return model.kv_lora_rank or 0


def _values(model: Model) -> int:
    return model.num_attention_heads * model.v_head_dim


def _query_dims(model: Model) -> int:
    return model.num_attention_heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)


def _key_value_dims(model: Model) -> int:
    return model.num_attention_heads * (model.qk_head_dim + model.v_head_dim)


LATENT_ATTENTION = (
    layer_entry("input_layernorm.weight", "input_layernorm.weight", all_rows(hidden)),
    layer_entry(
        "self_attn.q_proj.weight",
        f"{_OURS}linear_q_proj.weight",
        all_rows(_query_dims),
        hidden,
        when=_plain,
    ),
    layer_entry(
        "self_attn.q_a_proj.weight",
        f"{_OURS}linear_q_down_proj.weight",
        all_rows(_query_rank),
        hidden,
        when=_compressed,
    ),
    layer_entry(
        "self_attn.q_a_layernorm.weight",
        f"{_OURS}q_layernorm.weight",
        all_rows(_query_rank),
        when=_compressed,
    ),
    layer_entry(
        "self_attn.q_b_proj.weight",
        f"{_OURS}linear_q_up_proj.weight",
        all_rows(_query_dims),
        _query_rank,
        when=_compressed,
    ),
    layer_entry(
        "self_attn.kv_a_proj_with_mqa.weight",
        f"{_OURS}linear_kv_down_proj.weight",
        all_rows(lambda model: _key_value_rank(model) + model.qk_pos_emb_head_dim),
        hidden,
    ),
    layer_entry(
        "self_attn.kv_a_layernorm.weight",
        f"{_OURS}kv_layernorm.weight",
        all_rows(_key_value_rank),
    ),
    layer_entry(
        "self_attn.kv_b_proj.weight",
        f"{_OURS}linear_kv_up_proj.weight",
        all_rows(_key_value_dims),
        _key_value_rank,
    ),
    layer_entry("self_attn.o_proj.weight", f"{_OURS}linear_proj.weight", all_rows(hidden), _values),
)


EXPERT_BIAS = layer_entry(
    "mlp.gate.e_score_correction_bias",
    "mlp.router.expert_bias",
    all_rows(num_experts),
    where="sparse",
)
SHARED_EXPERTS = gated_mlp(
    "mlp.shared_experts",
    "mlp.shared_experts",
    lambda model: model.moe_shared_expert_intermediate_size or 0,
    where="sparse",
    names=GATE_UP_DOWN,
)


def write_layers(model: Model) -> dict[str, Any]:
    """Which layers have experts, their widths. Raises ``RecipeError`` where these have no field."""
    sparse = model.moe_layers
    dense = sparse.index(True) if True in sparse else len(sparse)
    shared, width = model.moe_shared_expert_intermediate_size or 0, model.expert_ffn_hidden_size
    if any(not has for has in sparse[dense:]) or not any(sparse):
        raise RecipeError("moe_layer_freq has dense layers behind sparse ones, there all are first")
    if not shared or shared % width:
        raise RecipeError(
            f"moe_shared_expert_intermediate_size is {shared}, there a multiple of "
            f"moe_ffn_hidden_size {width}"
        )
    return {
        "first_k_dense_replace": dense,
        "moe_intermediate_size": width,
        "n_shared_experts": shared // width,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor or 1.0,
        "num_nextn_predict_layers": 0,
    }


def read_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of ``write_layers``."""
    width, dense = config["moe_intermediate_size"], config["first_k_dense_replace"] or 0
    return {
        "moe_layer_freq": [int(layer >= dense) for layer in range(config["num_hidden_layers"])],
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": width * config["n_shared_experts"],
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }


LAYERS_READ = frozenset(
    {
        *("moe_intermediate_size", "first_k_dense_replace", "n_shared_experts"),
        *("routed_scaling_factor", "num_hidden_layers"),
    }
)
"""Config fields that ``read_layers`` looks at."""
LAYERS_COMPUTED = frozenset(
    {
        *("moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"),
        "moe_router_topk_scaling_factor",
    }
)
"""Settings of ``Model`` that ``read_layers`` gives."""


def write_groups(model: Model) -> dict[str, Any]:
    """Groups of experts. Raises ``RecipeError`` where megatron-core scores them in another way."""
    groups, chosen = model.moe_router_num_groups or 1, model.moe_router_group_topk or 1
    if groups > 1 and model.moe_router_topk // chosen != 2:
        raise RecipeError(
            f"moe_router_topk {model.moe_router_topk} over moe_router_group_topk {chosen} scores a "
            "group by another number of experts, there by 2"
        )
    return {"n_group": groups, "topk_group": chosen}


def read_groups(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of ``write_groups``. Raises ``CheckpointError`` as it."""
    groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
    topk = config["num_experts_per_tok"]
    if groups > 1 and topk // chosen != 2:
        raise CheckpointError(
            f"config.json: n_group is {groups}, and num_experts_per_tok {topk} over topk_group "
            f"{chosen} is not 2; megatron-core scores a group by that many experts, DeepSeek by 2"
        )
    if topk == 1:
        raise CheckpointError(
            "config.json: num_experts_per_tok is 1, whose weight DeepSeek makes 1 and "
            "megatron-core leaves as it is"
        )
    return {
        "moe_router_num_groups": groups if groups > 1 else None,
        "moe_router_group_topk": chosen if groups > 1 else None,
    }


GROUPS_READ = frozenset({"n_group", "topk_group", "num_experts_per_tok"})
"""Config fields that ``read_groups`` looks at."""
GROUPS_COMPUTED = frozenset({"moe_router_num_groups", "moe_router_group_topk"})
"""Settings of ``Model`` that ``read_groups`` gives."""


def write_latent(model: Model) -> dict[str, Any]:
    """Latent attention. Raises ``RecipeError`` for another epsilon of its norms."""
    epsilon = model.latent_layernorm_epsilon or model.layernorm_epsilon
    if epsilon != _LATENT_EPSILON:
        raise RecipeError(f"latent_layernorm_epsilon is {epsilon}, there {_LATENT_EPSILON}")
    return {
        "head_dim": model.qk_pos_emb_head_dim,
        "num_key_value_heads": model.num_attention_heads,
    }


def read_latent(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of ``write_latent``."""
    epsilon = config["rms_norm_eps"]
    return {
        "num_query_groups": config["num_attention_heads"],
        "latent_layernorm_epsilon": None if epsilon == _LATENT_EPSILON else _LATENT_EPSILON,
    }


LATENT_NAMES = {
    **{name: ours for name, ours in NAMES.items() if ours != "kv_channels"},
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_head_dim",
    "qk_rope_head_dim": "qk_pos_emb_head_dim",
    "v_head_dim": "v_head_dim",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
}
# Layers that predict a second token, which transformers passes over, too.
SECOND_TOKEN_LAYER = r"model\.layers\.NUM_LAYERS\..*"
SECOND_TOKEN = dict.fromkeys(
    ("num_mtp_layers", "num_nextn_predict_layers"), "of a layer that predicts a second token"
)

FAMILY = Family(
    architecture="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    head=HEAD,
    layer=(
        *LATENT_ATTENTION,
        *MLP_NORM,
        *MLP,
        *routed_experts("mlp", GATE_UP_DOWN),
        EXPERT_BIAS,
        *SHARED_EXPERTS,
    ),
    tail=TAIL,
    names=LATENT_NAMES,
    fixed={
        **FIXED,
        "attention_bias": (False,),
        "rope_interleave": (True,),
        "norm_topk_prob": (True,),
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
    },
    requires={"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    computed=LAYERS_COMPUTED | GROUPS_COMPUTED | {"latent_layernorm_epsilon"},
    reads=LAYERS_READ | GROUPS_READ,
    harmless=SECOND_TOKEN,
    stretched=frozenset({"yarn"}),
    free=frozenset({"kv_channels", "num_query_groups"}),
    ignored=SECOND_TOKEN_LAYER,
    write=lambda model: {**write_layers(model), **write_groups(model), **write_latent(model)},
    read=lambda config: {**read_layers(config), **read_groups(config), **read_latent(config)},
)
