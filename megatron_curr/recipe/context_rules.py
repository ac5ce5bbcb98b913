"""Which exchanges of context-parallel attention a model's heads admit."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.problems import Problem
from megatron_curr.recipe.schema import RunRecipe
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.wording import divisors


def hierarchical_choices(model: Model | VideoDiT, parallel: Parallel) -> list[list[int]]:
    """Every [all-to-all, ring] pair of sizes for ``a2a+p2p``, largest all-to-all first.

    An all-to-all deals key/value heads out, so its size divides those of a tensor rank.
    """
    cp_size = parallel.context_parallel_size
    heads = model.num_query_groups // parallel.tensor_model_parallel_size
    return [
        [size, cp_size // size]
        for size in range(cp_size // 2, 1, -1)
        if cp_size % size == 0 and heads % size == 0
    ]


def hierarchical_sizes(model: Model | VideoDiT, parallel: Parallel) -> list[int] | None:
    """The recipe's sizes, else the largest all-to-all; None where the exchange is another."""
    if parallel.context_parallel_exchange != "a2a+p2p" or parallel.context_parallel_size == 1:
        return None
    if parallel.hierarchical_context_parallel_sizes is not None:
        return parallel.hierarchical_context_parallel_sizes
    return next(iter(hierarchical_choices(model, parallel)), None)


def context_exchange_problems(recipe: RunRecipe) -> Iterator[Problem]:
    """Rules of ``parallel.context_parallel_exchange``, which is unused on one context rank."""
    model, parallel = recipe.model, recipe.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    kind, groups = parallel.context_parallel_exchange, model.num_query_groups
    if cp == 1 or groups % tp:  # heads that tensor ranks cannot share have a rule of their own
        return
    heads = groups // tp
    choices = hierarchical_choices(model, parallel)
    if kind == "a2a" and heads % cp:
        others = "'p2p' or 'a2a+p2p'" if choices else "'p2p'"
        yield Problem(
            ("parallel", "context_parallel_exchange"),
            f"'a2a' deals key/value heads over the context ranks, and context_parallel_size {cp} "
            f"does not divide the {heads} of a tensor rank (model.num_query_groups {groups} / "
            f"tensor {tp}); use {others}, or context_parallel_size {divisors(heads)}",
        )
    if kind != "a2a+p2p":
        return
    sizes = parallel.hierarchical_context_parallel_sizes
    if not choices:
        others = "'p2p'" if heads % cp else "'p2p' or 'a2a'"
        yield Problem(
            ("parallel", "context_parallel_exchange"),
            f"'a2a+p2p' needs an all-to-all of fewer ranks than context_parallel_size {cp}, and "
            f"more than 1, that divides both {cp} and the {heads} key/value heads of a tensor rank "
            f"(model.num_query_groups {groups} / tensor {tp}); there is none: use {others}",
        )
    elif sizes is not None and sizes not in choices:
        yield Problem(
            ("parallel", "hierarchical_context_parallel_sizes"),
            f"found {sizes}; the product must be context_parallel_size {cp}, and the first must "
            f"divide the {heads} key/value heads of a tensor rank; "
            f"use {' or '.join(map(str, choices))}, or leave it out for {choices[0]}",
        )
