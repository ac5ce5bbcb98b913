"""A run: its parts, its counters, and what the loop asks of it."""

from __future__ import annotations

import importlib.metadata
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.data.keyed import WORD, digest_of
from megatron_curr.data.loader import Batch, Loader
from megatron_curr.data.order import SampleOrder
from megatron_curr.data.video_loader import VideoBatch, VideoLoader
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.incarnation.record import Beat
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.load import recipe_fingerprint
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training import optimizer_state
from megatron_curr.training.checkpoint import Checkpointer
from megatron_curr.training.checkpoint_folder import RunState, SourceState
from megatron_curr.training.console import Narrator
from megatron_curr.training.evaluate import Evaluator
from megatron_curr.training.life import Life
from megatron_curr.training.metrics import LostWork, Metrics, Value
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.training.signals import StopSignals
from megatron_curr.training.step import Loss, Stepper, Update
from megatron_curr.training.step_values import StepValues
from megatron_curr.training.video_evaluate import VideoEvaluator

AnyBatch = Batch | VideoBatch

HALF_WORD = 32  # bits
_LIBRARIES = ("megatron_curr", "megatron-core", "torch", "numpy")


class LedgerWatch(Protocol):
    """Finds amendments; on rank 0 only."""

    def look(self, horizon_tokens: int) -> bool:
        """Whether the ledger has grown; nothing before the horizon is amended from now on."""

    def read(self) -> list[str]:
        """The ledger's whole lines."""

    def close(self) -> None:
        """Look no more."""


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

    recipe: Recipe | VideoRecipe
    folder: RunFolder
    life: Life
    order: SampleOrder | VideoOrder
    ledger_head: str
    groups: Groups
    stepper: Stepper
    loader: Loader | VideoLoader
    evaluator: Evaluator | VideoEvaluator
    checkpointer: Checkpointer
    metrics: Metrics
    narrator: Narrator
    signals: StopSignals
    hooks: Sequence[Hook]
    step_values: StepValues

    consumed_tokens: int = 0
    step: int = 0
    nonfinite_steps: int = 0
    nonfinite_in_a_row: int = 0
    stop_reason: str | None = None
    wants_to_stop: bool = False  # some rank got a signal; known to all after each step
    is_save_written: bool = False  # no rank's writer is busy; known to all after each step
    samples_digest: str = ""  # of what all ranks read in the newest step
    has_amendments: bool = False  # rank 0 saw the ledger grow; known to all after each step
    ledger_watch: LedgerWatch | None = None  # on rank 0, while steps are taken
    resumed: tuple[int, int] = (0, 0)  # step and token this start began from
    saved: tuple[int, int] = (0, 0)  # of the newest checkpoint
    longest_save_s: float | None = None  # from the decision to the published checkpoint
    evaluated_tokens: int = -1  # clock of the last evaluation before this start, -1 for none
    lost: LostWork = field(default_factory=LostWork)  # of earlier starts, done again by this one

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

    @property
    def ending(self) -> tuple[str, str]:
        """Cause and sentence for the incarnation's record, at a clean end."""
        if self.is_complete:
            return "complete", f"complete at token {self.consumed_tokens}"
        cause, text = self.stop_reason or "stop-at", f"at token {self.consumed_tokens}"
        if cause.startswith("--stop-at"):
            return "stop-at", f"{cause}: saved {text}"
        if cause == signal.SIGINT.name:
            return "interrupted", f"stopped by Ctrl-C {text}"
        known = f"signal:{cause}" if cause in signal.Signals.__members__ else "signal"
        return known, f"stopped by {cause} {text}"

    def take(self, plan: StepPlan) -> list[AnyBatch]:
        """This rank's micro-batches of the step."""
        self.life.enter("compute")
        return self.loader.take(plan)

    def forward_backward(
        self, plan: StepPlan, batches: Sequence[Batch] | Sequence[VideoBatch]
    ) -> Loss:
        """Gradients and loss of the step; tells all ranks of signals, saves and amendments, too."""
        flags = (
            self.signals.received is not None,
            self.checkpointer.is_writing,
            self.ledger_watch is not None and self.ledger_watch.look(plan.next_consumed_tokens),
            *self._read_here(batches),
        )
        loss = self.stepper.forward_backward(batches, flags=flags)
        self.wants_to_stop, self.is_save_written = loss.flags[0] > 0, loss.flags[1] == 0
        self.has_amendments = loss.flags[2] > 0
        low, high = (round(half) for half in loss.flags[3:5])
        self.samples_digest = digest_of(low + (high << HALF_WORD))
        return loss

    def _read_here(self, batches: Sequence[Batch] | Sequence[VideoBatch]) -> tuple[float, float]:
        """Both halves of the sum of what these batches are; 0 where a peer reads the same ones.

        Halves, because ranks are added up in float64: whole up to a million of them.
        """
        if self.groups.tp_rank or self.groups.pp_rank or self.groups.cp_rank:
            return 0.0, 0.0
        total = sum(int(batch.identities_B.sum()) for batch in batches) % WORD
        return float(total % 2**HALF_WORD), float(total >> HALF_WORD)

    def optimizer_step(self, plan: StepPlan, loss: Loss) -> Update:
        """Apply the update, or refuse and count it."""
        update = self.stepper.update(plan, loss)
        self.step = plan.step + 1
        self.nonfinite_steps += not update.applied
        self.nonfinite_in_a_row = 0 if update.applied else self.nonfinite_in_a_row + 1
        self.life.step_ended(self.step)
        return update

    def log(self, plan: StepPlan, *, loss: Loss, update: Update) -> None:
        """Write the step's row and tell the user."""
        if self.groups.rank != 0:
            return
        step_time_s = self.life.steps_s[-1]
        values: dict[str, float | None] = {
            "train/grad_norm": None if loss.is_empty else update.grad_norm,
            "train/learning_rate": plan.learning_rate,
            "train/weight_decay": plan.weight_decay,
            "train/global_batch_tokens": plan.step_tokens,
            "train/nonfinite_steps": self.nonfinite_steps,
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_s": plan.step_tokens / step_time_s,
            "perf/data_wait_s": self.loader.last_wait_s,
            **self.step_values.of(plan, loss),
        }
        if (peak := self.recipe.logging.peak_flops_per_device) is not None:
            values["perf/mfu_frac"] = (values["train/step_flops"] or 0.0) / (
                step_time_s * peak * self.groups.world_size
            )
        if not update.applied:
            values["train/nonfinite_first_position"] = plan.position
            values["train/nonfinite_num_samples"] = plan.num_samples
        self.write({**values, "data/samples_digest": self.samples_digest}, plan.phase)
        self.narrator.step(
            step=self.step,
            consumed_tokens=self.consumed_tokens,
            phase=plan.phase,
            loss=loss.mean,
            tokens_per_s=plan.step_tokens / step_time_s,
        )

    def write(self, values: Mapping[str, Value], phase: str) -> None:
        """Write one row at the clock as it stands."""
        self.metrics.write(
            values, step=self.step, consumed_tokens=self.consumed_tokens, phase=phase
        )

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

    def write_beat(self) -> None:
        """Rank 0 tells whoever looks at the run folder how far the run is."""
        if self.groups.rank != 0:
            return
        self.life.enter(self.life.stage)  # count up to now
        self.life.write_beat(
            Beat(
                at_s=time.time(),
                step=self.step,
                consumed_tokens=self.consumed_tokens,
                resumed_step=self.resumed[0],
                resumed_tokens=self.resumed[1],
                saved_step=self.saved[0],
                saved_tokens=self.saved[1],
                lost_tokens=self.lost.num_tokens,
                lost_s=self.lost.time_s,
                times_s=self.life.times_s,
                step_time_s=self.life.step_time_s,
                save_s=self.longest_save_s,
            )
        )

    def close(self, *, waits: bool = True) -> None:
        """Stop the loader's thread, close the metrics, take the progress bar down.

        ``waits`` gives the loggers time to send their last rows.
        """
        self.loader.close()
        self.narrator.close()
        self.metrics.close(waits=waits)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close(waits=problem[0] is None)

    def restore(self, state: RunState) -> None:
        """Put the counters where a checkpoint left them."""
        self.consumed_tokens, self.step = state.consumed_tokens, state.step
        self.nonfinite_steps = state.nonfinite_steps
        self.nonfinite_in_a_row = state.nonfinite_in_a_row
        self.resumed = self.saved = (state.step, state.consumed_tokens)


def library_versions() -> dict[str, str]:
    """Versions that could change numbers, for the record."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "from source"
    return versions
