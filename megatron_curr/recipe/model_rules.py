"""Which settings of an architecture go together: those that our models and no others combine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.problems import Problem
from megatron_curr.recipe.schema import Recipe

_PLAIN = {
    "norm_position": "before",
    "normalization": "RMSNorm",
    "activation": "swiglu",
    "linear_biases": "none",
    "parallel_residual": False,
    "residual_multiplier": 1.0,
}
_OWN_NORMS = {name: _PLAIN[name] for name in ("normalization", "linear_biases")}
# A setting with this value, and what no model here combines with it.
_APART: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("norm_position", "after", {**_OWN_NORMS, "parallel_residual": False}),
    ("norm_position", "both", {**_OWN_NORMS, "parallel_residual": False}),
    ("qk_layernorm", True, {"normalization": "RMSNorm"}),
    ("shared_residual_norm", True, {"parallel_residual": True}),
    ("layernorm_bias", False, {"normalization": "LayerNorm"}),
    ("qk_layernorm_over", "projection", {"layernorm_zero_centered_gamma": False}),
    ("linear_biases", "into_residual", {"residual_multiplier": 1.0}),
)


def architecture(recipe: Recipe) -> Iterator[Problem]:
    """The model's settings, experts aside, agree with each other and with the layout."""
    model, parallel = recipe.model, recipe.parallel
    yield from combinations(model)
    tp_size = parallel.tensor_model_parallel_size
    if model.has_latent_attention and tp_size > 1 and not parallel.sequence_parallel:
        yield Problem(
            ("parallel", "sequence_parallel"),
            "false; multi-latent attention over tensor ranks needs true: otherwise the gradient of "
            "the key that heads share would lack the other ranks' parts",
        )


def combinations(model: Model) -> Iterator[Problem]:
    """The model's settings, experts aside, agree with each other."""
    for name, value, needed in _APART:
        if getattr(model, name) == value:
            yield from _must_be(model, needed, because=f"{name} {_told(value)}")
    if model.num_moe_experts is not None:
        yield from _must_be(model, _PLAIN, because="num_moe_experts")
    if model.qk_layernorm_over == "projection" and not model.qk_layernorm:
        yield Problem(
            ("model", "qk_layernorm_over"), "is for models with qk_layernorm: true; set it as well"
        )
    rotated = model.kv_channels * model.rotary_percent
    if rotated % 2:
        yield Problem(
            ("model", "rotary_percent"),
            f"found {model.rotary_percent}; rotates {rotated:g} of {model.kv_channels} dims of a "
            "head, which must be an even number",
        )
    for name in ("no_rope_freq", "window_attn_skip_freq"):
        layers = getattr(model, name)
        if isinstance(layers, list) and len(layers) != model.num_layers:
            yield Problem(
                ("model", name),
                f"lists {len(layers)} layers of {model.num_layers}; give a 1 or 0 for each, or a "
                "number",
            )
    for name in ("window_attn_skip_freq", "window_rotary_base"):
        if getattr(model, name) is not None and model.window_size is None:
            yield Problem(("model", name), "is for layers with a window; set window_size as well")
    yield from _stretched_rotations(model)
    yield from _latent(model)


def _stretched_rotations(model: Model) -> Iterator[Problem]:
    kinds = ("rope_scaling_factor", "seq_len_interpolation_factor", "yarn_scaling_factor")
    given = [name for name in kinds if getattr(model, name) is not None]
    if len(given) > 1:
        yield Problem(
            ("model", given[1]), f"rotations are stretched one way: leave out this or {given[0]}"
        )
    if model.yarn_scaling_factor is not None:
        whole = {"rotary_percent": 1.0, "rotary_interleaved": False}
        yield from _must_be(model, whole, because="yarn_scaling_factor")


def _latent(model: Model) -> Iterator[Problem]:
    if not model.has_latent_attention:
        for field in ("q_lora_rank", "latent_layernorm_epsilon"):
            if getattr(model, field) is not None:
                yield Problem(
                    ("model", field), "is for multi-latent attention; set kv_lora_rank as well"
                )
        return
    plain = {
        **_PLAIN,
        "num_query_groups": model.num_attention_heads,
        "qk_layernorm": False,
        "add_qkv_bias": False,
        "rotary_percent": 1.0,
        "rope_scaling_factor": None,
        "seq_len_interpolation_factor": None,
        "rotary_interleaved": False,
        "no_rope_freq": None,
        "softmax_scale": None,
        "window_size": None,
    }
    yield from _must_be(model, plain, because="kv_lora_rank")


def expert_groups(model: Model) -> Iterator[Problem]:
    """Experts chosen from groups: both settings, and numbers that divide."""
    groups, chosen = model.moe_router_num_groups, model.moe_router_group_topk
    if groups is None and chosen is None:
        return
    if groups is None or chosen is None:
        missing = "moe_router_num_groups" if groups is None else "moe_router_group_topk"
        yield Problem(("model", missing), "is missing; groups of experts need both settings")
        return
    count, topk = model.num_moe_experts or 0, model.moe_router_topk
    if count % groups or chosen > groups:
        yield Problem(
            ("model", "moe_router_num_groups"),
            f"found {groups}; must divide num_moe_experts {count} and be at least "
            f"moe_router_group_topk {chosen}",
        )
    elif topk % chosen or topk // chosen > count // groups:
        yield Problem(
            ("model", "moe_router_group_topk"),
            f"found {chosen}; must divide moe_router_topk {topk}, into at most the "
            f"{count // groups} experts of a group",
        )


def _must_be(model: Model, needed: dict[str, Any], *, because: str) -> Iterator[Problem]:
    for name, value in needed.items():
        found = getattr(model, name)
        if found != value:
            yield Problem(
                ("model", name),
                f"found {_told(found)}; no model with {because} has it: set {_told(value)}",
            )


def _told(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
