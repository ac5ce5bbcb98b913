"""Put a run together from what was prepared: model, optimizer, loader, evaluator, checkpoints."""

from __future__ import annotations

import logging

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer

from megatron_curr.data.loader import Loader
from megatron_curr.models.gpt import PRECISIONS, build_gpt_chunks
from megatron_curr.parallel.data_parallel import finish_param_gather, wrap_for_data_parallel
from megatron_curr.parallel.groups import Groups, build_groups
from megatron_curr.plan.model_size import model_flops_per_token
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training.checkpoint import Checkpointer
from megatron_curr.training.console import Narrator
from megatron_curr.training.evaluate import Evaluator
from megatron_curr.training.hooks import (
    Evaluate,
    RecordStart,
    Save,
    StopOnNonFinite,
    StopOnRequest,
)
from megatron_curr.training.metrics import Metrics, build_metrics, drop_rows_after
from megatron_curr.training.preflight import Prepared
from megatron_curr.training.run import Run
from megatron_curr.training.signals import StopSignals
from megatron_curr.training.step import Stepper

log = logging.getLogger(__name__)


def build_run(
    prepared: Prepared, *, signals: StopSignals, stop_at_tokens: int | None = None
) -> Run:
    """This rank's run, standing at the newest intact checkpoint, or at token 0. Collective.

    ``torch.distributed`` is initialised; rank 0 holds the folder's lock. The caller closes the run.
    """
    recipe, folder = prepared.recipe, prepared.folder
    groups = build_groups(recipe.parallel, seed=recipe.seed)
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=prepared.vocab_size)
    checkpointer = Checkpointer(
        folder.checkpoints,
        chunks=[chunk.module for chunk in chunks],
        optimizer=optimizer,
        pg_collection=groups.pg_collection,
        settings=recipe.checkpoint,
        finish_weights=lambda: finish_param_gather(chunks),
    )
    state, passed_over = checkpointer.load_newest()
    for line in passed_over:
        log.warning(line)
    consumed_tokens = state.consumed_tokens if state else 0
    run = Run(
        recipe=recipe,
        folder=folder,
        order=prepared.order,
        ledger_head=prepared.ledger[-1].hash,
        groups=groups,
        stepper=Stepper(
            chunks,
            optimizer,
            groups=groups,
            num_sources=len(prepared.order.sources),
            clip_grad=recipe.optimizer.clip_grad,
        ),
        loader=build_loader(prepared, groups),
        evaluator=Evaluator(
            recipe, prepared.heldout_sets, groups=groups, vocab_size=prepared.vocab_size
        ),
        checkpointer=checkpointer,
        metrics=_build_metrics(recipe, prepared, groups, consumed_tokens=consumed_tokens),
        narrator=Narrator(prepared.schedule.total_tokens, speaks=groups.rank == 0),
        signals=signals,
        flops_per_token=_flops_per_token(prepared),
        hooks=(
            RecordStart(),
            StopOnNonFinite(recipe.training.max_nonfinite_steps),
            StopOnRequest(stop_at_tokens),
            Evaluate(recipe.evaluation.every_tokens),
            Save(recipe.checkpoint.every_tokens),
        ),
    )
    if state is not None:
        run.restore(state)
        log.info("resumed at token %d, step %d", run.consumed_tokens, run.step)
    return run


def build_model(
    recipe: Recipe, *, groups: Groups, vocab_size: int
) -> tuple[list[DistributedDataParallel], MegatronOptimizer]:
    """This rank's pipeline chunks, wrapped for data parallel, and their optimizer."""
    parallel, precision, adam = recipe.parallel, recipe.training.precision, recipe.optimizer
    chunks = build_gpt_chunks(
        recipe.model,
        parallel=parallel,
        precision=precision,
        groups=groups,
        vocab_size=vocab_size,
        isolate_documents=recipe.data.isolate_documents,
        seed=recipe.seed,
    )
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
    return wrapped, optimizer


def build_loader(prepared: Prepared, groups: Groups) -> Loader:
    """Reads this data-parallel rank's samples; its tensor, pipeline, context peers do alike."""
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


def _flops_per_token(prepared: Prepared) -> dict[int, float]:
    """By every sequence length of the run."""
    model, vocab_size = prepared.recipe.model, prepared.vocab_size
    return {
        length: model_flops_per_token(model, vocab_size=vocab_size, seq_length=length)
        for length in {stretch.seq_length for stretch in prepared.schedule.stretches}
    }


def say_how_it_ended(run: Run) -> None:
    """Tell the user what the run has come to, and how it goes on."""
    if run.is_complete:
        log.info(
            "complete: %d steps, %d tokens; %s", run.step, run.consumed_tokens, run.folder.path
        )
        return
    log.info(
        "stopped by %s at token %d of %d, saved; to go on: megatron-curr train %s --ranks %d",
        run.stop_reason,
        run.consumed_tokens,
        run.schedule.total_tokens,
        run.folder.recipe,
        run.groups.world_size,
    )


def _build_metrics(
    recipe: Recipe, prepared: Prepared, groups: Groups, *, consumed_tokens: int
) -> Metrics:
    if groups.rank != 0:
        return Metrics([])
    folder = prepared.folder
    dropped = drop_rows_after(folder.metrics, consumed_tokens, aside=folder.logs)
    if dropped:
        log.info(
            "%d rows of metrics.jsonl lie after token %d and will be written again; moved to %s",
            dropped,
            consumed_tokens,
            folder.logs,
        )
    return build_metrics(recipe, path=folder.metrics, logs=folder.logs)
