"""The plan of a run: does it fit, how long does it take, what does it send, read and write.

``plan_run`` is what ``megatron-curr plan`` prints and ``megatron-curr submit`` checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_curr.curriculum.lots import planner_of
from megatron_curr.curriculum.schedule import Schedule, build_schedule
from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.alternatives import layouts_that_fit
from megatron_curr.plan.cluster import Cluster
from megatron_curr.plan.dit import dit_parameters
from megatron_curr.plan.findings import CheckpointPlan, PhasePlan, Plan
from megatron_curr.plan.flops import Ints
from megatron_curr.plan.layout import Axes, Stage, axes_of, pipeline_stages
from megatron_curr.plan.memory import StageMemory, stage_memory, state_bytes
from megatron_curr.plan.model_size import num_active_parameters, num_parameters
from megatron_curr.plan.phases import PhaseSteps, epoch_warnings, epochs_by_phase, phase_steps
from megatron_curr.plan.shapes import (
    AnyRecipe,
    Shape,
    largest,
    shares_of,
    text_shape,
    video_shapes,
)
from megatron_curr.plan.step_time import step_time, together
from megatron_curr.plan.traffic import Message, messages
from megatron_curr.recipe.check import check_layout, check_recipe
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

_GIB = 2**30


def plan_run(
    recipe: AnyRecipe,
    cluster: Cluster,
    *,
    vocab_size: int | None = None,
    source_tokens: Mapping[str, int] | None = None,
    document_tokens: Ints | None = None,
    remarks: Sequence[str] = (),
    mfu: float | None = None,
    is_fused: bool = True,
) -> Plan:
    """The plan of a recipe on a cluster, from what is known of its data.

    ``vocab_size`` is the tokenizer's, for a model that names none; ``document_tokens`` [n] a sample
    of documents' lengths, for isolated ones; ``mfu`` states the utilisation instead of working it
    out; ``is_fused``: with Transformer Engine. Raises ``RecipeError`` for a recipe that its layout,
    or these ranks, cannot run.
    """
    check_recipe(recipe)
    check_layout(recipe, cluster.world_size)
    schedule = build_schedule(recipe.curriculum, planner := planner_of(recipe))
    steps = phase_steps(schedule, planner.cells if planner else ())
    shapes = _shapes(
        recipe, steps, vocab_size=vocab_size, is_fused=is_fused, document_tokens=document_tokens
    )
    axes = axes_of(recipe.parallel, cluster.world_size)
    stages = pipeline_stages(recipe.model.num_layers, recipe.parallel)
    longest = largest([shape for of_phase in shapes for shape, _ in of_phase])
    batch = longest.batch
    most_rounds = most_micro_batches(steps, longest.micro_batch_tokens * axes.data.size)
    memory = tuple(
        stage_memory(batch, stage, axes=axes, num_micro_batches=most_rounds) for stage in stages
    )
    epochs = epochs_by_phase(steps, source_tokens or {})
    problems, warnings = epoch_warnings(steps, epochs, recipe.data.sources)
    short = _shortage(memory, cluster)
    parameters, active = _parameters(batch)
    plan = Plan(
        recipe=recipe,
        cluster=cluster,
        batch=batch,
        keys_per_token=largest([shape for shape, _ in shapes[-1]]).keys_per_token,
        axes=axes,
        stages=stages,
        memory=memory,
        parameters=parameters,
        active_parameters=active,
        phases=tuple(
            _phase_plan(phase, of_phase, stages, axes=axes, cluster=cluster, mfu=mfu)
            for phase, of_phase in zip(steps, shapes, strict=True)
        ),
        messages=_busiest(batch, stages, axes=axes, num_micro_batches=most_rounds),
        checkpoints=checkpoint_plan(recipe, schedule, num_weights=parameters),
        epochs=epochs,
        stated_mfu=mfu,
        problems=(*short, *problems),
        warnings=tuple(warnings),
        remarks=(*remarks, *_assumptions(recipe, document_tokens)),
    )
    return replace(plan, alternatives=tuple(layouts_that_fit(plan))) if short else plan


def _shapes(
    recipe: AnyRecipe,
    steps: Sequence[PhaseSteps],
    *,
    vocab_size: int | None,
    is_fused: bool,
    document_tokens: Ints | None,
) -> list[list[tuple[Shape, float]]]:
    """For each phase, its shapes with their shares of its tokens."""
    if isinstance(recipe, VideoRecipe):
        by_cell = video_shapes(recipe, is_fused=is_fused)
        return [list(shares_of(phase.tokens_by_source, by_cell)) for phase in steps]
    return [
        [
            (
                text_shape(
                    recipe,
                    seq_length=phase.seq_length,
                    vocab_size=vocab_size,
                    is_fused=is_fused,
                    document_tokens=document_tokens,
                ),
                1.0,
            )
        ]
        for phase in steps
    ]


def _parameters(batch: MicroBatch) -> tuple[int, int]:
    """All, and those that a token meets."""
    model = batch.model
    if isinstance(model, Model):
        size = batch.vocab_size
        return num_parameters(model, vocab_size=size), num_active_parameters(model, vocab_size=size)
    return dit_parameters(model), dit_parameters(model)


def most_micro_batches(steps: Sequence[PhaseSteps], round_tokens: int) -> int:
    """Of a data-parallel rank in the largest step; 1 or more."""
    largest_batch = max(max(p.first_batch_tokens, p.last_batch_tokens) for p in steps)
    return max(largest_batch // round_tokens, 1)


def _phase_plan(
    phase: PhaseSteps,
    shapes: Sequence[tuple[Shape, float]],
    stages: Sequence[Stage],
    *,
    axes: Axes,
    cluster: Cluster,
    mfu: float | None,
) -> PhasePlan:
    flops = sum(share * shape.flops_per_token for shape, share in shapes)
    times, rounds = [], 0.0
    for shape, share in shapes:
        of_shape = phase.mean_batch_tokens * share / (axes.data.size * shape.micro_batch_tokens)
        times.append(
            step_time(
                shape.batch,
                stages,
                axes=axes,
                cluster=cluster,
                num_micro_batches=of_shape,
                keys_per_token=shape.keys_per_token,
            )
        )
        rounds += of_shape
    step = together(times)
    pace = cluster.world_size * cluster.gpu.peak_flops
    stated_s = flops * phase.mean_batch_tokens / (pace * mfu) if mfu else None
    return PhasePlan(phase, rounds, flops, step, stated_s or step.total_s)


def _shortage(memory: Sequence[StageMemory], cluster: Cluster) -> list[str]:
    """What does not fit, and where; nothing where all does."""
    held, has = [stage.total for stage in memory], cluster.gpu.memory_bytes
    if max(held) <= has:
        return []
    return [
        f"memory: a rank of pipeline stage {held.index(max(held))} needs "
        f"{max(held) / _GIB:.1f} GiB and a {cluster.gpu.name} has {has / _GIB:.1f}"
    ]


def _busiest(
    batch: MicroBatch, stages: Sequence[Stage], *, axes: Axes, num_micro_batches: int
) -> tuple[Message, ...]:
    """Of each kind of message, the largest of any stage."""
    largest: dict[tuple[str, str], Message] = {}
    for stage in stages:
        for message in messages(batch, stage, axes):
            key = (message.axis.name, message.what)
            size = message.step_bytes(num_micro_batches)
            if key not in largest or size > largest[key].step_bytes(num_micro_batches):
                largest[key] = message
    return tuple(message for message in largest.values() if message.step_bytes(1))


def checkpoint_plan(recipe: AnyRecipe, schedule: Schedule, *, num_weights: int) -> CheckpointPlan:
    """Weights and Adam's state, whole, each time."""
    settings, precision = recipe.checkpoint, recipe.training.precision
    keeps_average = recipe.training.ema_decay is not None
    per_weight = 2 if precision == "bf16" else 4
    per_weight += state_bytes(precision, keeps_average=keeps_average)
    total = schedule.total_tokens
    written = -(-total // settings.every_tokens)
    keepers = total // settings.keep_every_tokens if settings.keep_every_tokens else 0
    kept = min(settings.keep_last + keepers, written)
    return CheckpointPlan(
        bytes_each=per_weight * num_weights,
        num_written=written,
        num_kept=kept,
        most_at_once=min(settings.keep_last + 1 + keepers, written),
    )


def _assumptions(recipe: AnyRecipe, document_tokens: Ints | None) -> list[str]:
    remarks = []
    if recipe.training.precision == "fp32":
        remarks.append("the clock reckons with the peak of bf16: fp32 takes many times as long")
    if isinstance(recipe, VideoRecipe):
        remarks.append("messages and memory are those of the longest clips")
    elif recipe.data.isolate_documents and document_tokens is None:
        remarks.append(
            "documents are isolated, but their lengths are not known here: attention is counted "
            "as if each window were one document, which is the most it can be"
        )
    if isinstance(recipe, Recipe) and recipe.data.chunk_tokens is None:
        longest = max(phase.seq_length for phase in recipe.curriculum.phases)
        remarks.append(
            f"data.chunk_tokens is the longest seq_length, {longest:,}, for the whole run: it "
            "leaves an amendment no room for longer ones; set it to a multiple before the start"
        )
    return remarks
