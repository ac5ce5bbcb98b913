"""Our training loop beside a bare megatron-core loop: same model, same batches, turn by turn.

    python -m benchmarks.step_overhead          # about 2 minutes on two cores

One process, one rank. After each step of ours the bare loop takes the same step on its own copy of
the model: zero the gradients, run megatron-core's forward-backward schedule, let its optimizer
step, read the loss. Its batches were cut before the clock started; ours come from the loader. Ours
also logs every step. Two phases of one sequence length follow each other, so the steps around the
switch are measured too. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from data_tools.make_demo import build_demo_data
from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.data.loader import Batch, Loader
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.training.build import build_model, build_run
from megatron_curr.training.life import begin_life
from megatron_curr.training.loop import train
from megatron_curr.training.preflight import Prepared, prepare
from megatron_curr.training.run import Run
from megatron_curr.training.signals import StopSignals

LOOP_RATIO, SWITCH_RATIO = 1.05, 1.2
NUM_STEPS, WARMUP_STEPS = 60, 5
STEP_TOKENS = 4096
AROUND_STEPS = 2  # on each side of the switch


def overrides(root: Path) -> list[str]:
    """The demo's recipe on one rank: two phases of one length, no evaluation or save on the way."""
    half = NUM_STEPS * STEP_TOKENS // 2
    phase = {"tokens": half, "seq_length": 256, "global_batch_tokens": STEP_TOKENS}
    first = {**phase, "name": "before", "mixture": {"prose": 0.7, "code": 0.3}}
    second = {**phase, "name": "after", "mixture": {"prose": 0.2, "code": 0.3, "math": 0.5}}
    first["learning_rate"] = 1e-3
    never = 10 * NUM_STEPS * STEP_TOKENS
    settings = {
        "run_folder": str(root / "run"),
        "data.tokenizer": str(root / "tokenizer.model"),
        **{
            f"data.sources.{name}.{split}": str(root / "shards" / name / folder)
            for name in ("prose", "code", "math")
            for split, folder in (("shards", "train"), ("heldout", "heldout"))
        },
        "curriculum.phases": [first, second],
        "parallel.tensor_model_parallel_size": 1,
        "parallel.sequence_parallel": False,
        "checkpoint.every_tokens": never,
        "evaluation.every_tokens": never,
    }
    return [f"{path}={value}" for path, value in settings.items()]


class BareLoop:
    """A hook that, after each step of ours, takes the same step the short way and times both."""

    def __init__(self, prepared: Prepared, run: Run) -> None:
        self.chunks, self.optimizer = build_model(
            prepared.recipe, groups=run.groups, vocab_size=prepared.vocab_size
        )
        for chunk in self.chunks:
            chunk.module.config.finalize_model_grads_func = finalize_model_grads
        self.batches = cut_batches(prepared, prepared.schedule)
        self.schedule = get_forward_backward_func(1, None)
        self.ours_s: list[float] = []
        self.bare_s: list[float] = []
        self.began_s = 0.0

    def before_run(self, run: Run) -> None:
        """Start the clock of our first step."""
        self.began_s = time.perf_counter()

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Our step ends here; take the bare one."""
        ended_s = time.perf_counter()
        self.ours_s.append(ended_s - self.began_s)
        self.step(plan, self.batches[plan.step])
        self.began_s = time.perf_counter()
        self.bare_s.append(self.began_s - ended_s)

    def after_run(self, run: Run) -> None:
        """Nothing is left to do."""

    def step(self, plan: StepPlan, batches: list[Batch]) -> None:
        """One step as a megatron-core example would write it."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            group["lr"], group["weight_decay"] = plan.learning_rate, plan.weight_decay
        sums = self.schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=self.chunks[0],
            num_microbatches=len(batches),
            seq_length=plan.seq_length,
            micro_batch_size=len(batches[0].tokens_BS),
            forward_only=False,
        )
        self.optimizer.step()
        torch.stack(sums).sum().item()


def forward_step(batches: Iterator[Batch], model: torch.nn.Module):  # type: ignore[no-untyped-def]
    """Forward of one micro-batch, and its loss function."""
    batch = next(batches)
    losses_BS = model(batch.tokens_BS, None, None, labels=batch.labels_BS)
    return losses_BS, partial(summed_loss, batch.loss_mask_BS)


def summed_loss(mask_BS: torch.Tensor, losses_BS: torch.Tensor):  # type: ignore[no-untyped-def]
    """(loss to differentiate, its tokens, loss to report)."""
    total = (losses_BS.float() * mask_BS).sum()
    return total, mask_BS.sum().to(torch.int), total.detach()


def cut_batches(prepared: Prepared, schedule: Schedule) -> list[list[Batch]]:
    """Every step's micro-batches, in memory."""
    tokens = prepared.recipe.parallel.micro_batch_tokens
    steps, clock = [], 0
    with Loader(
        prepared.recipe, schedule, prepared.order, prepared.shard_sets,
        dp_rank=0, dp_size=1, micro_batch_tokens=tokens, vocab_size=prepared.vocab_size,
    ) as loader:  # fmt: skip
        while clock < schedule.total_tokens:
            plan = schedule.at(clock)
            steps.append(loader.take(plan))
            clock = plan.next_consumed_tokens
    return steps


def measure(root: Path) -> BareLoop:
    """Run both loops to the end of the recipe."""
    build_demo_data(root)
    prepared = prepare(load_recipe(shipped_recipe("demo_text.yaml"), overrides(root)), 1)
    life = begin_life(prepared.folder)
    prepared.folder.write_records(prepared.recipe, prepared.ledger, life.pen)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with build_run(prepared, life=life, signals=StopSignals()) as run:
        bare = BareLoop(prepared, run)
        run.hooks = (*run.hooks, bare)
        train(run)
    return bare


def main() -> int:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        times = measure(Path(folder))
    ratios = [ours / bare for ours, bare in zip(times.ours_s, times.bare_s, strict=True)]
    loop_ratio = statistics.median(ratios[WARMUP_STEPS:])
    ours_s = statistics.median(times.ours_s[WARMUP_STEPS:])
    bare_s = statistics.median(times.bare_s[WARMUP_STEPS:])
    middle = NUM_STEPS // 2
    around = ratios[middle - AROUND_STEPS : middle + AROUND_STEPS]
    switch_ratio = max(around) / loop_ratio
    table = Table("measure", "value", "to reach", "met")
    rows = [
        ("our step, s", f"{ours_s:.3f}", "", True),
        ("bare megatron-core step, s", f"{bare_s:.3f}", "", True),
        ("ours / bare, median of pairs", f"{loop_ratio:.3f}", f"<= {LOOP_RATIO}",
         loop_ratio <= LOOP_RATIO),
        ("slowest step around the switch / median, each against its bare twin",
         f"{switch_ratio:.3f}", f"<= {SWITCH_RATIO}", switch_ratio <= SWITCH_RATIO),
    ]  # fmt: skip
    for what, value, target, met in rows:
        table.add_row(what, value, target, ("yes" if met else "NO") if target else "")
    Console().print(table)
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
