"""The loop's features: the non-finite limit, stopping, evaluation, checkpoints."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Mapping

from megatron_curr.curriculum.schedule import StepPlan
from megatron_curr.training.checkpoint import SaveReport
from megatron_curr.training.console import spell_loss
from megatron_curr.training.life import BEAT_EVERY_S, RunFailed
from megatron_curr.training.run import Run
from megatron_curr.units import format_bytes, format_count, format_duration

log = logging.getLogger(__name__)

HELDOUT_LOSSES = ("loss_nats_per_token", "flow_mse")  # by source
_MOST_NAMED = 12  # sources in a line


class NonFiniteLimit(RunFailed):
    """Too many updates in a row were refused; the message says which samples fed them."""

    cause = "nonfinite"


class SaveFailed(RunFailed):
    """The last save of a run did not reach the disk; what it would have held is lost."""

    cause = "save-failed"


class Quiet:
    """A hook that does nothing; base of the others."""

    def before_run(self, run: Run) -> None:
        """Nothing."""

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Nothing."""

    def after_run(self, run: Run) -> None:
        """Nothing."""


class RecordStart(Quiet):
    """Writes one row a start, so that restarts and their layouts can be told from the metrics."""

    def before_run(self, run: Run) -> None:
        """Write the layout at the token this start begins from; a complete run does not start."""
        if run.is_complete:
            return
        groups = run.groups
        run.write(
            {
                "run/num_ranks": groups.world_size,
                "run/dp_size": groups.dp_size,
                "run/tp_size": groups.tp_size,
                "run/pp_size": groups.pp_size,
                "run/cp_size": groups.cp_size,
            },
            run.schedule.stretch_at(max(run.consumed_tokens - 1, 0)).phase,
        )


class ShowProgress(Quiet):
    """Writes a beat every few seconds, so that a run that dies tells how far it came."""

    def __init__(self) -> None:
        self._beat_s = 0.0

    def before_run(self, run: Run) -> None:
        """Tell where this start begins."""
        run.write_beat()

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Rank 0 finds out here that it is stale, and tells how far the run is."""
        if run.groups.rank == 0:
            run.life.pen.check()
        if time.monotonic() - self._beat_s > BEAT_EVERY_S:
            self._beat_s = time.monotonic()
            run.write_beat()

    def after_run(self, run: Run) -> None:
        """Tell where it ends; the last save follows and tells of itself."""
        run.write_beat()


class StopOnNonFinite(Quiet):
    """Ends the run after a number of refused updates in a row; no checkpoint is written then."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._refused: list[StepPlan] = []

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Warn about a refused update; raise ``NonFiniteLimit`` at the limit."""
        if not run.nonfinite_in_a_row:
            self._refused = []
            return
        self._refused = [*self._refused, plan][-self._limit :]
        first, end = self._refused[0].position, plan.position + plan.num_samples
        place = shlex.quote(str(run.folder.path))
        trace = f"megatron-curr trace {place} --position {first} --count {end - first}"
        log.warning(
            "step %d: the loss or the gradient is not finite; the update is refused (%d in a row), "
            "weights stay as they were; samples %d to %d fed it",
            run.step,
            run.nonfinite_in_a_row,
            plan.position,
            end - 1,
        )
        if run.nonfinite_in_a_row < self._limit:
            return
        if run.checkpointer.is_pending:
            report = run.checkpointer.publish()
            if report.error is None:
                run.saved = (report.state.step, report.state.consumed_tokens)
        run.write_beat()
        raise NonFiniteLimit(
            f"stopped at step {run.step}, {run.consumed_tokens} consumed tokens: the loss or the "
            f"gradient was not finite in {run.nonfinite_in_a_row} steps in a row "
            f"(training.max_nonfinite_steps={self._limit}). Samples {first} to {end - 1} fed them; "
            f"see them with: {trace} --text\n"
            f"Every one of these updates was refused and no checkpoint was written since. "
            f"Lower the learning rate ahead, or take the samples out, and resume"
        )


class StopOnRequest(Quiet):
    """Ends the run on a signal to any rank, or at a token."""

    def __init__(self, stop_at_tokens: int | None) -> None:
        self._stop_at_tokens = stop_at_tokens

    def before_run(self, run: Run) -> None:
        """Take no step when the token is behind already."""
        self._stop_at(run)

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Set the reason to stop, if there is one."""
        self._stop_at(run)
        if run.wants_to_stop:
            received = run.signals.received
            run.stop_reason = received.name if received else "a signal to another rank"

    def _stop_at(self, run: Run) -> None:
        if self._stop_at_tokens is not None and run.consumed_tokens >= self._stop_at_tokens:
            run.stop_reason = f"--stop-at {self._stop_at_tokens}"


class Evaluate(Quiet):
    """Held-out loss at token 0, when a step crosses a multiple of ``every_tokens``, at the end."""

    def __init__(self, every_tokens: int) -> None:
        self._every_tokens = every_tokens
        self._evaluated_tokens = -1

    def before_run(self, run: Run) -> None:
        """Evaluate the first weights, and what the start before was asked to end before."""
        self._evaluated_tokens = run.evaluated_tokens
        if self._evaluated_tokens // self._every_tokens < run.consumed_tokens // self._every_tokens:
            self._evaluate(run)

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Evaluate when due; not when a signal asks the run to end within this step."""
        if crosses(plan, self._every_tokens) and not run.wants_to_stop:
            self._evaluate(run)

    def after_run(self, run: Run) -> None:
        """Evaluate the last weights of a complete run."""
        if run.is_complete and not run.wants_to_stop:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        if self._evaluated_tokens != run.consumed_tokens and run.evaluator.has_sources:
            self._evaluated_tokens = run.consumed_tokens
            with run.life.spending("evaluate"):
                values = run.evaluator.evaluate(run.stepper)
            run.write(values, run.schedule.stretch_at(max(run.consumed_tokens - 1, 0)).phase)
            if run.groups.rank == 0:
                at = format_count(run.consumed_tokens)
                log.info("held out, at token %s: %s", at, heldout_text(values))


class Save(Quiet):
    """Saves when due, without waiting for the writers, and at the end, waiting for them.

    Raises ``SaveFailed`` after ``max_failed`` saves in a row that failed.
    """

    def __init__(self, every_tokens: int, *, max_failed: int) -> None:
        self._every_tokens = every_tokens
        self._max_failed = max_failed
        self._num_failed = 0
        self._saved_step = 0

    def before_run(self, run: Run) -> None:
        """What was just loaded need not be saved again."""
        self._saved_step = run.step

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Publish a save that is written; begin one that is due."""
        if run.checkpointer.is_pending and run.is_save_written:
            self._publish(run)
        if crosses(plan, self._every_tokens) and not run.is_over:
            if run.checkpointer.is_pending:  # slower than the cadence: wait, or saves pile up
                self._publish(run)
            self._saved_step = run.step
            with run.life.spending("save"):
                report = run.checkpointer.begin(run.state())
            if report is not None:
                self._report(run, report)

    def after_run(self, run: Run) -> None:
        """Save the last state. Raises ``SaveFailed`` when it does not reach the disk."""
        if run.checkpointer.is_pending:
            self._publish(run)
        if self._saved_step == run.step:
            return
        with run.life.spending("save"):
            report = run.checkpointer.save(run.state())
        self._report(run, report)
        if report.error:
            raise SaveFailed(
                f"the last checkpoint, at token {run.consumed_tokens}, could not be saved "
                f"({report.error}); free some space in {run.checkpointer.folder} and run the same "
                "command again: the run goes on from the checkpoint before"
            )

    def _publish(self, run: Run) -> None:
        with run.life.spending("save"):
            report = run.checkpointer.publish()
        self._report(run, report)

    def _report(self, run: Run, report: SaveReport) -> None:
        if report.error:
            self._saved_step = -1  # the state is not on disk: the last save must not be skipped
            self._num_failed += 1
            log.warning(
                "checkpoint of step %d is given up (%s); the one before is intact%s",
                report.state.step,
                report.error,
                ", the run goes on" if self._num_failed < self._max_failed else "",
            )
            if self._num_failed >= self._max_failed:
                run.write_beat()
                raise SaveFailed(
                    f"stopped at step {run.step}: {self._num_failed} saves in a row failed "
                    f"(checkpoint.max_failed_saves), the last with {report.error}; what was "
                    f"trained since step {run.saved[0]} is on no disk. Mend "
                    f"{run.checkpointer.folder} and start again: the run goes on from there"
                )
            return
        self._num_failed = 0
        log.info(
            "checkpoint step_%08d saved: %s, training stood still for %s",
            report.state.step,
            format_bytes(report.size_bytes),
            format_duration(report.blocked_s),
        )
        run.saved = (report.state.step, report.state.consumed_tokens)
        run.longest_save_s = max(report.total_s, run.longest_save_s or 0.0)
        run.write_beat()
        run.metrics.write(
            {
                "checkpoint/blocked_s": report.blocked_s,
                "checkpoint/total_s": report.total_s,
                "checkpoint/size_bytes": report.size_bytes,
            },
            step=report.state.step,
            consumed_tokens=report.state.consumed_tokens,
            phase=run.schedule.stretch_at(max(report.state.consumed_tokens - 1, 0)).phase,
        )


def heldout_text(values: Mapping[str, float | None]) -> str:
    """The held-out losses by source, for a line: ``prose 3.4127, code nothing counts``."""
    told = []
    for name, value in values.items():
        source, _, what = name.removeprefix("eval/").rpartition("/")
        if what in HELDOUT_LOSSES:
            told.append(f"{source} {spell_loss(value)}")
    more = len(told) - _MOST_NAMED
    shown = told if more <= 0 else [*told[:_MOST_NAMED], f"{more} more in metrics.jsonl"]
    return ", ".join(shown)


def crosses(plan: StepPlan, every_tokens: int) -> bool:
    """Whether a multiple of ``every_tokens`` lies in the step, its end included."""
    return plan.next_consumed_tokens // every_tokens > plan.consumed_tokens // every_tokens
