"""A run: its parts, its counters, and what the loop asks of it."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.data.loader import Batch, Loader
from megatron_curr.data.order import SampleOrder
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.load import recipe_fingerprint
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training import optimizer_state
from megatron_curr.training.checkpoint import Checkpointer
from megatron_curr.training.checkpoint_folder import RunState, SourceState
from megatron_curr.training.console import Narrator
from megatron_curr.training.evaluate import Evaluator
from megatron_curr.training.metrics import LISTED_SOURCES, Metrics
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.training.signals import StopSignals
from megatron_curr.training.step import Loss, Stepper, Update

_LIBRARIES = ("megatron_curr", "megatron-core", "torch", "numpy")


class Hook(Protocol):
    """A feature of the loop. Every rank calls every hook at the same points, in the same order."""

    def before_run(self, run: Run) -> None:
        """The run is about to take its first step of this start."""

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """A step is over; the clock stands at its end."""

    def after_run(self, run: Run) -> None:
        """The schedule is at its end, or the run was stopped."""


@dataclass(kw_only=True)
class Run:
    """One rank's run."""

    recipe: Recipe
    folder: RunFolder
    order: SampleOrder
    ledger_head: str
    groups: Groups
    stepper: Stepper
    loader: Loader
    evaluator: Evaluator
    checkpointer: Checkpointer
    metrics: Metrics
    narrator: Narrator
    signals: StopSignals
    hooks: Sequence[Hook]
    flops_per_token: dict[int, float] = field(default_factory=dict)  # by seq_length

    consumed_tokens: int = 0
    step: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    stop_reason: str | None = None
    wants_to_stop: bool = False  # some rank got a signal; known to all after each step
    is_save_written: bool = False  # no rank's writer is busy; known to all after each step
    _began_s: float = 0.0
    _consumed: dict[str, int] = field(default_factory=dict)  # by source, at the last row

    @property
    def schedule(self) -> Schedule:
        """The curriculum of the run."""
        return self.order.schedule

    @property
    def is_complete(self) -> bool:
        """Whether the clock stands at the end of the schedule."""
        return self.consumed_tokens >= self.schedule.total_tokens

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take now."""
        return self.is_complete or self.stop_reason is not None

    def take(self, plan: StepPlan) -> list[Batch]:
        """This rank's micro-batches of the step."""
        self._began_s = time.perf_counter()
        return self.loader.take(plan)

    def forward_backward(self, plan: StepPlan, batches: Sequence[Batch]) -> Loss:
        """Gradients and loss of the step; also tells every rank of signals and finished writers."""
        flags = (self.signals.received is not None, self.checkpointer.is_writing)
        loss = self.stepper.forward_backward(batches, flags=flags)
        self.wants_to_stop, self.is_save_written = loss.flags[0] > 0, loss.flags[1] == 0
        return loss

    def optimizer_step(self, plan: StepPlan, loss: Loss) -> Update:
        """Apply the update, or refuse and count it."""
        update = self.stepper.update(plan, loss)
        self.step = plan.step + 1
        self.nonfinite_steps += not update.applied
        self.nonfinite_in_a_row = 0 if update.applied else self.nonfinite_in_a_row + 1
        return update

    def log(self, plan: StepPlan, *, loss: Loss, update: Update) -> None:
        """Write the step's row and tell the user."""
        if self.groups.rank != 0:
            return
        step_time_s = time.perf_counter() - self._began_s
        values = {
            "train/loss_nats_per_token": loss.mean,
            "train/grad_norm": update.grad_norm,
            "train/learning_rate": plan.learning_rate,
            "train/weight_decay": plan.weight_decay,
            "train/global_batch_tokens": plan.step_tokens,
            "train/seq_length_tokens": plan.seq_length,
            "train/nonfinite_steps": self.nonfinite_steps,
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_s": plan.step_tokens / step_time_s,
            "perf/data_wait_s": self.loader.last_wait_s,
            **self._source_values(plan, loss),
            **self._mfu(plan, step_time_s),
        }
        if not update.applied:
            values["train/nonfinite_first_position"] = plan.position
            values["train/nonfinite_num_samples"] = plan.num_samples
        self.write(values, plan.phase)
        self.narrator.step(
            step=self.step,
            consumed_tokens=self.consumed_tokens,
            phase=plan.phase,
            loss=loss.mean,
            tokens_per_s=values["perf/tokens_per_s"],
        )

    def write(self, values: dict[str, float], phase: str) -> None:
        """Write one row at the clock as it stands."""
        self.metrics.write(
            values, step=self.step, consumed_tokens=self.consumed_tokens, phase=phase
        )

    def _source_values(self, plan: StepPlan, loss: Loss) -> dict[str, float]:
        before = self._consumed
        self._consumed = consumed = self.order.consumed_tokens(plan.position + plan.num_samples)
        values = {}
        for index, name in enumerate(self.order.sources):
            mean = loss.mean_of(index)
            if mean is not None:
                values[f"train/{name}/loss_nats_per_token"] = mean
            if len(consumed) <= LISTED_SOURCES or consumed[name] != before.get(name):
                values[f"data/{name}/consumed_tokens"] = consumed[name]
                values[f"data/{name}/epochs"] = consumed[name] / int(self.order.num_tokens[index])
        return values

    def _mfu(self, plan: StepPlan, step_time_s: float) -> dict[str, float]:
        peak = self.recipe.logging.peak_flops_per_device
        if peak is None:
            return {}
        flops = self.flops_per_token[plan.seq_length] * plan.step_tokens
        return {"perf/mfu_frac": flops / step_time_s / (peak * self.groups.world_size)}

    def state(self) -> RunState:
        """Everything a checkpoint stores beside the tensors."""
        position = self.schedule.position_of(self.consumed_tokens)
        if self.is_complete:
            position = self.schedule.total_samples
        consumed, epochs = self.order.consumed_tokens(position), self.order.epochs(position)
        sizes = dict(zip(self.order.sources, self.order.num_tokens.tolist(), strict=True))
        groups = self.groups
        return RunState(
            consumed_tokens=self.consumed_tokens,
            step=self.step,
            optimizer_step=optimizer_state.applied_updates(self.stepper.optimizer),
            ledger_head=self.ledger_head,
            recipe_fingerprint=recipe_fingerprint(self.recipe),
            sources={
                name: SourceState(
                    consumed_tokens=consumed[name], epochs=epochs[name], num_tokens=sizes[name]
                )
                for name in self.order.sources
            },
            nonfinite_steps=self.nonfinite_steps,
            nonfinite_in_a_row=self.nonfinite_in_a_row,
            keep=self.checkpointer.is_keeper(self.consumed_tokens),
            layout={
                "dp": groups.dp_size,
                "tp": groups.tp_size,
                "pp": groups.pp_size,
                "cp": groups.cp_size,
            },
            versions=library_versions(),
        )

    def close(self) -> None:
        """Stop the loader's thread, close the metrics, take the progress bar down."""
        self.loader.close()
        self.narrator.close()
        self.metrics.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def restore(self, state: RunState) -> None:
        """Put the counters where a checkpoint left them."""
        self.consumed_tokens, self.step = state.consumed_tokens, state.step
        self.nonfinite_steps = state.nonfinite_steps
        self.nonfinite_in_a_row = state.nonfinite_in_a_row


def library_versions() -> dict[str, str]:
    """Versions that could change numbers, for the record."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "from source"
    return versions
