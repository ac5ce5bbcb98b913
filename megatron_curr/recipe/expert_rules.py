"""Rules of models with experts, and of the ranks that share the experts out."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.model_rules import expert_groups
from megatron_curr.recipe.problems import Problem
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.wording import divisors, either

_LAYOUT = "parallel"
_FOR_EXPERTS = (
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_aux_loss_coeff",
    "moe_router_enable_expert_bias",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
)


def experts(recipe: Recipe) -> Iterator[Problem]:
    """The model's own settings of experts agree with each other."""
    yield from expert_combinations(recipe.model)


def expert_combinations(model: Model) -> Iterator[Problem]:
    """As ``experts``, of a model by itself."""
    count = model.num_moe_experts
    if count is None:
        for field in _FOR_EXPERTS:
            if getattr(model, field):
                yield Problem(
                    ("model", field), "is for models with experts; set num_moe_experts as well"
                )
        return
    if model.moe_router_topk > count:
        yield Problem(
            ("model", "moe_router_topk"),
            f"found {model.moe_router_topk}; the model has {count} experts: use {count} or fewer",
        )
    yield from _scores(model)
    yield from expert_groups(model)
    if isinstance(model.moe_layer_freq, list):
        if len(model.moe_layer_freq) != model.num_layers:
            yield Problem(
                ("model", "moe_layer_freq"),
                f"lists {len(model.moe_layer_freq)} layers of {model.num_layers}; give a 1 or 0 "
                "for each, or a number",
            )
        elif not any(model.moe_layer_freq):
            yield Problem(
                ("model", "moe_layer_freq"),
                "gives no layer experts; set a 1, or leave num_moe_experts out",
            )


def _scores(model: Model) -> Iterator[Problem]:
    softmax = model.moe_router_score_function == "softmax"
    if model.moe_router_enable_expert_bias and softmax:
        yield Problem(
            ("model", "moe_router_enable_expert_bias"),
            "true needs moe_router_score_function: sigmoid; set it",
        )
    if model.moe_router_topk == 1 and softmax and not model.moe_router_pre_softmax:
        yield Problem(
            ("model", "moe_router_topk"),
            "found 1; a softmax over one chosen expert is always 1 and trains no router; set "
            "moe_router_pre_softmax: true",
        )


def expert_split(recipe: Recipe) -> Iterator[Problem]:
    """The experts can be shared out and cut as the layout asks."""
    model, parallel = recipe.model, recipe.parallel
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp_size
    tp = parallel.tensor_model_parallel_size
    if model.num_moe_experts is None:
        for field in ("expert_model_parallel_size", "expert_tensor_parallel_size"):
            if getattr(parallel, field) not in (None, 1):
                yield Problem(
                    (_LAYOUT, field), "needs model.num_moe_experts; leave it out without experts"
                )
        return
    if model.num_moe_experts % ep:
        yield Problem(
            (_LAYOUT, "expert_model_parallel_size"),
            f"found {ep}; does not divide model.num_moe_experts {model.num_moe_experts}; "
            f"use {divisors(model.num_moe_experts)}",
        )
    width = model.expert_ffn_hidden_size
    if width % etp:
        yield Problem(
            (_LAYOUT, "expert_tensor_parallel_size"),
            f"found {etp}; does not divide model.moe_ffn_hidden_size {width:_}; "
            f"use {divisors(gcd(width, tp))}",
        )
    shared = model.moe_shared_expert_intermediate_size
    if shared is not None and shared % tp:
        yield Problem(
            (_LAYOUT, "tensor_model_parallel_size"),
            f"found {tp}; does not divide model.moe_shared_expert_intermediate_size {shared:_}; "
            f"use {divisors(gcd(shared, model.num_query_groups))}",
        )
    if tp > 1 and not parallel.sequence_parallel:
        yield Problem(
            (_LAYOUT, "sequence_parallel"),
            f"false with tensor_model_parallel_size {tp}; a model with experts needs true: "
            "otherwise every tensor rank would send the same tokens to the experts",
        )


def expert_ranks(recipe: Recipe, world_size: int) -> Iterator[Problem]:
    """The ranks hold whole sets of experts on every pipeline stage."""
    parallel = recipe.parallel
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp_size
    pp = parallel.pipeline_model_parallel_size
    size = ep * etp * pp
    if recipe.model.num_moe_experts is not None and world_size % size:
        yield Problem(
            (_LAYOUT, "expert_model_parallel_size"),
            f"{world_size} ranks cannot hold expert {ep} x expert tensor {etp} x pipeline {pp} "
            f"= {size} ranks; start {either(world_size, size)} ranks, or change the layout",
        )
