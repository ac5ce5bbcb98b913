"""Layouts near one that does not fit, that do; the fastest of the nearest first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, log2
from typing import TYPE_CHECKING, Any

from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.layout import axes_of, padded_vocab_size, pipeline_stages
from megatron_curr.plan.memory import stage_memory
from megatron_curr.plan.step_time import step_time
from megatron_curr.recipe.check import recipe_problems
from megatron_curr.recipe.layout_rules import rank_problems
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.recipe.wording import divisors_of

if TYPE_CHECKING:
    from megatron_curr.plan.findings import Plan

MOST = 5
NEARER = 2
"""Of so many times ``MOST`` layouts, the nearest that fit, the fastest are told."""
_RECOMPUTE_FIELDS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)


@dataclass(frozen=True, slots=True)
class Alternative:
    """A layout that fits, as arguments for the command line."""

    arguments: tuple[str, ...]
    step_s: float  # of the last phase
    peak_bytes: float
    distance: float  # doublings and halvings of sizes; one for recomputing all


def layouts_that_fit(plan: Plan) -> list[Alternative]:
    """The nearest layouts that these ranks can run and their memory holds, fastest first."""
    found: list[Alternative] = []
    tried: set[tuple[str, ...]] = {()}
    for distance, parallel in sorted(_candidates(plan), key=lambda pair: pair[0]):
        if len(found) >= NEARER * MOST:
            break
        arguments = _arguments(plan.recipe.parallel, parallel)
        if arguments in tried:
            continue
        tried.add(arguments)
        if (measured := _measured(plan, parallel)) is not None:
            found.append(Alternative(arguments, *measured, distance))
    return sorted(found, key=lambda alternative: alternative.step_s)[:MOST]


def _candidates(plan: Plan) -> Iterator[tuple[float, Parallel]]:
    recipe, cluster = plan.recipe, plan.cluster
    model, old = recipe.model, recipe.parallel
    shareable = gcd(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    tensor = [size for size in divisors_of(shareable) if size <= cluster.gpus_per_node]
    pipeline = [size for size in divisors_of(model.num_layers) if size <= 64]
    context = [1, 2, 4, 8, 16]
    experts = [1]
    if isinstance(model, Model) and model.num_moe_experts:
        experts = [size for size in divisors_of(model.num_moe_experts) if size <= 64]
    recomputations = _recomputations(plan)
    micro = {old.micro_batch_tokens}
    if isinstance(model, Model):
        micro.add(plan.batch.seq_length)
    for tp, pp, cp, ep, tokens in product(tensor, pipeline, context, experts, micro):
        if cluster.world_size % (tp * pp * cp):
            continue
        for chunks in _chunk_counts(old, model.num_layers, pp):
            sizes = _sizes(old, tp=tp, pp=pp, cp=cp, ep=ep, chunks=chunks, tokens=tokens)
            apart = _distance(old, sizes)
            for cost, recompute in recomputations:
                yield apart + cost, _moved(old, sizes, recompute)


def _recomputations(plan: Plan) -> list[tuple[float, dict[str, Any]]]:
    """(how far it is from the recipe's, settings): the recipe's own, none, the MLPs, all."""
    layers = [plan.batch.has_experts(layer) for layer in range(plan.recipe.model.num_layers)]
    modules = (["moe"] if any(layers) else []) + (["mlp"] if not all(layers) else [])
    return [
        (0.0, {}),
        (0.5, {"recompute_granularity": None}),
        (0.5, {"recompute_granularity": "selective", "recompute_modules": modules}),
        (1.0, {"recompute_granularity": "full", "recompute_method": "uniform"}),
    ]


def _chunk_counts(old: Parallel, num_layers: int, pp: int) -> set[int | None]:
    """No interleaving, or the recipe's, where the layers of a stage admit it."""
    chunks = old.virtual_pipeline_model_parallel_size
    if pp == 1 or chunks is None or num_layers // pp % chunks:
        return {None}
    return {None, chunks}


def _sizes(
    old: Parallel, *, tp: int, pp: int, cp: int, ep: int, chunks: int | None, tokens: int
) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": tp,
        "sequence_parallel": tp > 1,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": chunks,
        "context_parallel_size": cp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1 if ep > 1 and tp > 1 else old.expert_tensor_parallel_size,
        "hierarchical_context_parallel_sizes": None,
        "num_layers_in_first_pipeline_stage": None,
        "num_layers_in_last_pipeline_stage": None,
        "micro_batch_tokens": tokens,
        "use_distributed_optimizer": True,
    }


def _distance(old: Parallel, sizes: dict[str, Any]) -> float:
    doublings = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "context_parallel_size",
        "expert_model_parallel_size",
        "micro_batch_tokens",
    )
    apart: float = sum(abs(log2(sizes[name] / getattr(old, name))) for name in doublings)
    chunks = "virtual_pipeline_model_parallel_size"
    return apart + (0.5 if sizes[chunks] != getattr(old, chunks) else 0.0)


def _moved(old: Parallel, sizes: dict[str, Any], recompute: dict[str, Any]) -> Parallel:
    fresh = {**dict.fromkeys(_RECOMPUTE_FIELDS), **recompute} if recompute else {}
    return old.model_copy(update={**sizes, **fresh})


def _measured(plan: Plan, parallel: Parallel) -> tuple[float, float] | None:
    """Step time and peak memory of the layout, where it may run and fits."""
    recipe, cluster = plan.recipe, plan.cluster
    batch = _moved_batch(plan, parallel)
    if batch is None:
        return None
    axes = axes_of(parallel, cluster.world_size)
    if not axes.data.size or cluster.world_size % (
        parallel.expert_model_parallel_size
        * parallel.expert_tp_size
        * parallel.pipeline_model_parallel_size
    ):
        return None
    last = plan.phases[-1].steps
    round_tokens = axes.data.size * batch.num_samples * batch.seq_length
    rounds = last.mean_batch_tokens / round_tokens
    if rounds < 1:
        return None
    stages = pipeline_stages(recipe.model.num_layers, parallel)
    batches = [
        max(phase.steps.first_batch_tokens, phase.steps.last_batch_tokens) for phase in plan.phases
    ]
    most_rounds = max(batches) // round_tokens
    peak = max(
        stage_memory(batch, stage, axes=axes, num_micro_batches=most_rounds).total
        for stage in {0: stages[0], -1: stages[-1]}.values()
    )
    if peak > cluster.gpu.memory_bytes or not _may_run(recipe, parallel, cluster.world_size):
        return None
    step = step_time(
        batch,
        stages,
        axes=axes,
        cluster=cluster,
        num_micro_batches=rounds,
        keys_per_token=plan.keys_per_token,
    )
    return step.total_s, peak


def _moved_batch(plan: Plan, parallel: Parallel) -> MicroBatch | None:
    """The longest micro-batch on another layout; None where the layout changes the model."""
    batch = plan.batch
    if isinstance(batch.model, Model):
        padded = padded_vocab_size(batch.vocab_size, batch.model, parallel)
        if padded != batch.vocab_size:
            return None
        num_samples = parallel.micro_batch_tokens // batch.seq_length
        return replace(batch, parallel=parallel, num_samples=num_samples)
    return replace(batch, parallel=parallel)


def _may_run(recipe: Recipe | VideoRecipe, parallel: Parallel, world_size: int) -> bool:
    moved = recipe.model_copy(update={"parallel": parallel})
    return not recipe_problems(moved) and not rank_problems(moved, world_size)


def _arguments(old: Parallel, new: Parallel) -> tuple[str, ...]:
    """What has changed, as ``--set`` takes it."""
    return tuple(
        f"parallel.{name}={_written(value)}"
        for name in Parallel.model_fields
        if (value := getattr(new, name)) != getattr(old, name)
    )


def _written(value: Any) -> str:
    """As YAML has it."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower()
