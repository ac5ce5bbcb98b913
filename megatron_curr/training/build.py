"""Put a run together from what was prepared: model, optimizer, loader, evaluator, checkpoints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_curr.data.loader import Loader
from megatron_curr.data.video_loader import VideoLoader
from megatron_curr.models.gpt import build_gpt_chunks
from megatron_curr.models.layout_settings import PRECISIONS
from megatron_curr.models.video_dit import build_video_dit_chunks
from megatron_curr.parallel.data_parallel import finish_param_gather, wrap_for_data_parallel
from megatron_curr.parallel.groups import Groups, build_groups
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.amendments import TakeAmendments
from megatron_curr.training.checkpoint import Checkpointer
from megatron_curr.training.checkpoint_folder import RunState
from megatron_curr.training.console import Narrator
from megatron_curr.training.evaluate import Evaluator
from megatron_curr.training.hooks import (
    Evaluate,
    RecordStart,
    Save,
    ShowProgress,
    StopOnNonFinite,
    StopOnRequest,
)
from megatron_curr.training.life import Life
from megatron_curr.training.metrics import (
    LostWork,
    Metrics,
    build_metrics,
    drop_rows_after,
    last_evaluated_tokens,
)
from megatron_curr.training.node_checks import check_groups
from megatron_curr.training.objectives import NextToken, Objective, RectifiedFlow
from megatron_curr.training.optimizer_state import start_average
from megatron_curr.training.preflight import Prepared
from megatron_curr.training.run import Hook, Run
from megatron_curr.training.signals import StopSignals
from megatron_curr.training.step import Stepper
from megatron_curr.training.step_values import StepValues, TextValues, VideoValues
from megatron_curr.training.stragglers import NameStragglers
from megatron_curr.training.video_evaluate import VideoEvaluator
from megatron_curr.units import format_duration

log = logging.getLogger(__name__)

FirstWeights = Callable[[list[torch.nn.Module], Groups], None]  # fills the chunks


def build_run(
    prepared: Prepared,
    *,
    life: Life,
    signals: StopSignals,
    stop_at_tokens: int | None = None,
    open_first_weights: Callable[[], FirstWeights | None] = lambda: None,
    node_local: Path | None = None,
) -> Run:
    """This rank's run, standing at the newest intact checkpoint, or at token 0. Collective.

    ``torch.distributed`` is initialised, the folder is claimed. The caller closes the run. Where
    there is no checkpoint, and only there, ``open_first_weights`` is asked what fills the chunks:
    a run that goes on needs them no more. Saves go through ``node_local``.
    """
    life.enter("load")
    recipe, folder = prepared.recipe, prepared.folder
    groups = build_groups(recipe.parallel, seed=recipe.seed)
    check_groups(groups, life)
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=prepared.vocab_size)
    checkpointer = Checkpointer(
        folder.checkpoints,
        chunks=[chunk.module for chunk in chunks],
        optimizer=optimizer,
        pg_collection=groups.pg_collection,
        settings=recipe.checkpoint,
        pen=life.checkpoint_pen,
        node_local=node_local,
        finish_weights=lambda: finish_param_gather(chunks),
    )
    state, passed_over = checkpointer.load_newest()
    if state is None and (first_weights := open_first_weights()) is not None:
        first_weights([chunk.module for chunk in chunks], groups)
        optimizer.reload_model_params()  # its fp32 copies
        if recipe.training.ema_decay is not None:
            start_average(optimizer)
    for line in passed_over:
        log.warning(line)
    metrics, lost, evaluated = _build_metrics(prepared, groups, life, state)
    run = Run(
        recipe=recipe,
        folder=folder,
        life=life,
        order=prepared.order,
        ledger_head=prepared.ledger[-1].hash,
        groups=groups,
        stepper=build_stepper(prepared, groups, chunks, optimizer),
        loader=build_loader(prepared, groups),
        evaluator=build_evaluator(prepared, groups),
        checkpointer=checkpointer,
        metrics=metrics,
        lost=lost,
        evaluated_tokens=evaluated,
        narrator=Narrator(prepared.schedule.total_tokens, speaks=groups.rank == 0),
        signals=signals,
        step_values=build_step_values(prepared),
        hooks=_hooks(prepared, stop_at_tokens),
    )
    _begin_at(run, state)
    return run


def _begin_at(run: Run, state: RunState | None) -> None:
    if state is None:
        log.info("a new run, from token 0, in %s", run.folder.path)
    else:
        run.restore(state)
        log.info("resumed at token %d, step %d", run.consumed_tokens, run.step)


def _hooks(prepared: Prepared, stop_at_tokens: int | None) -> tuple[Hook, ...]:
    """The features of the loop, in the order they are called."""
    recipe = prepared.recipe
    return (
        RecordStart(),
        TakeAmendments(prepared.ledger, replan),
        ShowProgress(),
        NameStragglers(),
        StopOnNonFinite(recipe.training.max_nonfinite_steps),
        StopOnRequest(stop_at_tokens),
        Evaluate(recipe.evaluation.every_tokens),
        Save(recipe.checkpoint.every_tokens, max_failed=recipe.checkpoint.max_failed_saves),
    )


def build_model(
    recipe: Recipe | VideoRecipe, *, groups: Groups, vocab_size: int
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """This rank's pipeline chunks, wrapped for data parallel, and their optimizer."""
    parallel, precision, adam = recipe.parallel, recipe.training.precision, recipe.optimizer
    chunks = _build_chunks(recipe, groups=groups, vocab_size=vocab_size)
    wrapped = wrap_for_data_parallel(
        [chunk.to(groups.device) for chunk in chunks], parallel=parallel
    )
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            # Set anew on every parameter group before every update.
            lr=0.0,
            weight_decay=0.0,
            adam_beta1=adam.adam_beta1,
            adam_beta2=adam.adam_beta2,
            adam_eps=adam.adam_eps,
            clip_grad=adam.clip_grad,
            bf16=precision == "bf16",
            params_dtype=PRECISIONS[precision],
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        wrapped,
        use_gloo_process_groups=False,
    )
    if recipe.training.ema_decay is not None:
        start_average(optimizer)
    return wrapped, optimizer


def _build_chunks(
    recipe: Recipe | VideoRecipe, *, groups: Groups, vocab_size: int
) -> list[torch.nn.Module]:
    if isinstance(recipe, VideoRecipe):
        return build_video_dit_chunks(
            recipe.model,
            parallel=recipe.parallel,
            precision=recipe.training.precision,
            groups=groups,
            seed=recipe.seed,
        )
    return build_gpt_chunks(
        recipe.model,
        parallel=recipe.parallel,
        precision=recipe.training.precision,
        groups=groups,
        vocab_size=vocab_size,
        isolate_documents=recipe.data.isolate_documents,
        seed=recipe.seed,
    )


def build_stepper(
    prepared: Prepared,
    groups: Groups,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> Stepper:
    """Runs this rank's share of steps on the recipe's objective."""
    recipe = prepared.recipe
    objective: Objective = NextToken(groups)
    if isinstance(recipe, VideoRecipe):
        objective = RectifiedFlow(groups, patch=recipe.model.patch)
    return Stepper(
        chunks,
        optimizer,
        groups=groups,
        objective=objective,
        num_groups=prepared.order.num_groups,
        clip_grad=recipe.optimizer.clip_grad,
        ema_decay=recipe.training.ema_decay,
    )


def build_loader(prepared: Prepared, groups: Groups) -> Loader | VideoLoader:
    """Reads this data-parallel rank's samples; its tensor, pipeline, context peers do alike."""
    if isinstance(prepared.recipe, VideoRecipe):
        return VideoLoader(
            prepared.recipe,
            prepared.schedule,
            prepared.order,
            prepared.shard_sets,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )
    return Loader(
        prepared.recipe,
        prepared.schedule,
        prepared.order,
        prepared.shard_sets,
        dp_rank=groups.dp_rank,
        dp_size=groups.dp_size,
        micro_batch_tokens=prepared.recipe.parallel.micro_batch_tokens,
        vocab_size=prepared.vocab_size,
    )


def build_evaluator(prepared: Prepared, groups: Groups) -> Evaluator | VideoEvaluator:
    """Reads the held-out shards of the sources that the recipe has now."""
    if isinstance(prepared.recipe, VideoRecipe):
        return VideoEvaluator(
            prepared.recipe, prepared.order.cells, prepared.heldout_sets, groups=groups
        )
    return Evaluator(
        prepared.recipe, prepared.heldout_sets, groups=groups, vocab_size=prepared.vocab_size
    )


def replan(run: Run, prepared: Prepared) -> None:
    """Put another future in place of the run's; what it has read so far is the same in both."""
    run.loader.close()
    run.recipe, run.order = prepared.recipe, prepared.order
    run.ledger_head = prepared.ledger[-1].hash
    run.loader = build_loader(prepared, run.groups)
    run.evaluator = build_evaluator(prepared, run.groups)
    run.stepper.num_groups = prepared.order.num_groups
    run.narrator.total_tokens = prepared.schedule.total_tokens
    run.step_values = build_step_values(prepared)


def build_step_values(prepared: Prepared) -> StepValues:
    """What the rows of this kind of run say of a step."""
    if isinstance(prepared.recipe, VideoRecipe):
        return VideoValues(prepared.recipe, prepared.order, prepared.shard_sets)
    return TextValues(prepared.recipe, prepared.order, vocab_size=prepared.vocab_size)


def say_how_it_ended(run: Run) -> None:
    """Tell the user what the run has come to, and how it goes on."""
    if run.is_complete:
        log.info(
            "complete: %d steps, %d tokens; %s", run.step, run.consumed_tokens, run.folder.path
        )
        return
    log.info(
        "stopped by %s at token %d of %d, saved; to go on: %s",
        run.stop_reason,
        run.consumed_tokens,
        run.schedule.total_tokens,
        run.folder.resume_command(run.groups.world_size),
    )


def _build_metrics(
    prepared: Prepared, groups: Groups, life: Life, state: RunState | None
) -> tuple[Metrics, LostWork, int]:
    """The metrics, what they lost, and the clock of the last evaluation in them. Collective."""
    metrics, lost, evaluated = Metrics(), LostWork(), [-1]
    resumed_tokens = state.consumed_tokens if state else -1
    if groups.rank == 0:
        folder = prepared.folder
        lost = drop_rows_after(folder.metrics, resumed_tokens, aside=folder.logs, pen=life.pen)
        if lost.num_rows:
            log.info(
                "%d rows of metrics.jsonl lie after token %d and will be written again (%d tokens, "
                "%s of steps); moved to %s",
                lost.num_rows,
                max(resumed_tokens, 0),
                lost.num_tokens,
                format_duration(lost.time_s),
                folder.logs,
            )
        evaluated = [last_evaluated_tokens(folder.metrics)]
        metrics = build_metrics(
            prepared.recipe,
            path=folder.metrics,
            logs=folder.logs,
            incarnation=life.incarnation.number,
            resumed_tokens=resumed_tokens,
        )
    dist.broadcast_object_list(evaluated, 0)
    return metrics, lost, evaluated[0]
