"""Which layouts a model admits, and on how many ranks a layout runs."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

from megatron_curr.recipe.batch_rules import batches_over_ranks
from megatron_curr.recipe.context_rules import context_exchange_problems
from megatron_curr.recipe.expert_rules import expert_ranks, expert_split, experts
from megatron_curr.recipe.model_rules import architecture
from megatron_curr.recipe.problems import Problem
from megatron_curr.recipe.schema import Recipe, RunRecipe
from megatron_curr.recipe.video_rules import lots_over_ranks, video_layout_problems
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.recipe.wording import divisors, either, phase_path, use

_LAYOUT = "parallel"


def layout_problems(recipe: RunRecipe) -> list[Problem]:
    """Every rule that the layout breaks, whatever the number of ranks."""
    shared = (_tensor_split, _pipeline_split, context_exchange_problems, _overlap, _recompute)
    problems = [problem for rule in shared for problem in rule(recipe)]
    if isinstance(recipe, Recipe):
        for text_rule in (_context_split, architecture, experts, expert_split):
            problems += text_rule(recipe)
    if isinstance(recipe, VideoRecipe):  # whose sequences are padded to what the layout needs
        problems += video_layout_problems(recipe)
    return problems


def rank_problems(recipe: RunRecipe, world_size: int) -> list[Problem]:
    """Why this many ranks cannot run the layout and its batches; empty when they can."""
    parallel = recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, size = parallel.context_parallel_size, model_ranks(recipe)
    if world_size < 1 or world_size % size:
        return [
            Problem(
                (_LAYOUT,),
                f"{world_size} ranks cannot hold tensor {tp} x pipeline {pp} x context {cp} "
                f"= {size} ranks; start {either(world_size, size)} ranks, or change the layout",
            )
        ]
    if isinstance(recipe, VideoRecipe):
        return [*lots_over_ranks(recipe, world_size // size)]
    assert isinstance(recipe, Recipe)
    return [*expert_ranks(recipe, world_size), *batches_over_ranks(recipe, world_size // size)]


def model_ranks(recipe: RunRecipe) -> int:
    """Ranks that hold one model between them."""
    parallel = recipe.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _tensor_split(recipe: RunRecipe) -> Iterator[Problem]:
    model, tp = recipe.model, recipe.parallel.tensor_model_parallel_size
    path = (_LAYOUT, "tensor_model_parallel_size")
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        yield Problem(
            ("model", "num_query_groups"),
            f"found {groups}; must divide num_attention_heads {heads}: use {divisors(heads)}",
        )
    widths = {
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    indivisible = [f"model.{name} {width:_}" for name, width in widths.items() if width % tp]
    if indivisible:
        works = divisors(gcd(*widths.values()))
        yield Problem(path, f"found {tp}; does not divide {' or '.join(indivisible)}; use {works}")
    if recipe.parallel.sequence_parallel and tp == 1:
        yield Problem(
            (_LAYOUT, "sequence_parallel"),
            "true needs tensor_model_parallel_size above 1; set it to false",
        )


def _pipeline_split(recipe: RunRecipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    pp, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    virtual_path = (_LAYOUT, "virtual_pipeline_model_parallel_size")
    if chunks is not None and pp == 1:
        yield Problem(
            virtual_path, "needs pipeline_model_parallel_size above 1; leave it out on one stage"
        )
    ends = {
        name: layers
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
        if (layers := getattr(parallel, name)) is not None
    }
    if ends:
        yield from _uneven_stages(recipe, ends)
        return
    layers = recipe.model.num_layers
    if layers % pp:
        yield Problem(
            (_LAYOUT, "pipeline_model_parallel_size"),
            f"found {pp}; does not divide model.num_layers {layers}; use {divisors(layers)}",
        )
    elif chunks is not None and pp > 1 and layers % (pp * chunks):
        yield Problem(
            virtual_path,
            f"found {chunks}; a stage has {layers // pp} of the {layers} layers, which it must "
            f"divide: use {divisors(layers // pp)}",
        )


def _uneven_stages(recipe: RunRecipe, ends: dict[str, int]) -> Iterator[Problem]:
    """The stages of given size, and the others, which share what is left evenly."""
    parallel, layers = recipe.parallel, recipe.model.num_layers
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    path = (_LAYOUT, next(iter(ends)))
    if pp == 1:
        yield Problem(path, "needs pipeline_model_parallel_size above 1; leave it out on one stage")
        return
    left, stages = layers - sum(ends.values()), pp - len(ends)
    given = " and ".join(f"{name} {size}" for name, size in ends.items())
    if left < stages or (left and not stages) or (stages and left % stages):
        fits = f"{either(max(left, stages), stages)} of them" if stages else "none"
        yield Problem(
            path,
            f"{given} leave {max(left, 0)} of {layers} layers to {stages} other stages, which share"
            f" them evenly; leave {fits}",
        )
        return
    sizes = {**ends, "the others": left // stages} if stages else ends
    for name, size in sizes.items():
        if size % chunks:
            yield Problem(
                (_LAYOUT, "virtual_pipeline_model_parallel_size"),
                f"found {chunks}; does not divide the {size} layers of a stage ({name}); use "
                f"{divisors(gcd(*sizes.values()))}",
            )
            return


def _context_split(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    unit = 2 * cp if cp > 1 else 1
    reason = f"2 x context_parallel_size {cp}"
    if parallel.sequence_parallel:
        unit = lcm(unit, cp * tp)
        reason += f" and of context x tensor size {cp * tp}, for sequence_parallel"
    for index, phase in enumerate(recipe.curriculum.phases):
        if phase.seq_length % unit:
            yield Problem(
                phase_path(index, "seq_length"),
                f"found {phase.seq_length:_}; must be a multiple of {reason}, "
                f"{use(phase.seq_length, unit)}",
            )


def _overlap(recipe: RunRecipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    path = (_LAYOUT, "overlap_param_gather")
    if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
        yield Problem(path, "true needs use_distributed_optimizer: true; set one of the two")
    elif parallel.overlap_param_gather and not parallel.overlap_grad_reduce:
        yield Problem(path, "true needs overlap_grad_reduce: true as well; set it")


def _recompute(recipe: RunRecipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    for field, granularity in (
        ("recompute_method", "full"),
        ("recompute_num_layers", "full"),
        ("recompute_modules", "selective"),
    ):
        if getattr(parallel, field) and parallel.recompute_granularity != granularity:
            yield Problem(
                (_LAYOUT, field),
                f"is for recompute_granularity: {granularity} only, which is "
                f"{parallel.recompute_granularity or 'not set'}; set that, or leave this out",
            )
    unit = parallel.recompute_num_layers
    if unit is None or parallel.recompute_method == "block" or any(_pipeline_split(recipe)):
        return
    held = _held_layers(recipe)
    if any(layers % unit for layers in held):
        yield Problem(
            (_LAYOUT, "recompute_num_layers"),
            f"found {unit}; a rank holds {' or '.join(map(str, sorted(held)))} layers at a time, "
            f"which whole units make up (recompute_method uniform): use {divisors(gcd(*held))}",
        )


def _held_layers(recipe: RunRecipe) -> set[int]:
    """Layers of a pipeline stage, or of a virtual stage where there are any; as many as differ."""
    parallel = recipe.parallel
    ends = [
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    ]
    given = [layers for layers in ends if layers is not None]
    others = parallel.pipeline_model_parallel_size - len(given)
    stages = {*given, *([(recipe.model.num_layers - sum(given)) // others] if others else [])}
    return {layers // (parallel.virtual_pipeline_model_parallel_size or 1) for layers in stages}
