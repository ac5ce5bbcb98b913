"""The training loop. Everything else is a plan, made by the schedule, or a hook."""

from __future__ import annotations

from megatron_curr.training.run import Run


def train(run: Run) -> None:
    """Train from the run's clock until the schedule ends or a hook stops the run."""
    for hook in run.hooks:
        hook.before_run(run)
    while not run.is_over:
        plan = run.schedule.at(run.consumed_tokens)  # phase, batch, seq_length, rates
        batches = run.take(plan)  # this rank's micro-batches
        loss = run.forward_backward(plan, batches)
        update = run.optimizer_step(plan, loss)  # refuses a non-finite one
        run.consumed_tokens = plan.next_consumed_tokens  # the only line that moves the clock
        run.log(plan, loss=loss, update=update)
        for hook in run.hooks:  # non-finite limit, stop, evaluate, checkpoint
            hook.after_step(run, plan)
    for hook in run.hooks:
        hook.after_run(run)
