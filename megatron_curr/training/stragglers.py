"""Who is slow: every so many steps the ranks compare how long each took to come to the others.

In such a step all ranks meet once more, after their last micro-batch and before gradients are
summed. What a rank needs until then is its busy time, what it waits there its wait. Ranks that are
split by tensor, pipeline or context wait for each other within their group, so one that is slow
slows down its group: the group's ranks are then named together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.utils import get_model_config

from megatron_curr.curriculum.schedule import StepPlan
from megatron_curr.training.hooks import Quiet
from megatron_curr.training.run import Run

log = logging.getLogger(__name__)

EVERY_STEPS = 50
_SLOW = 1.2  # times the median busy time
_NAMED = 8


class NameStragglers(Quiet):
    """Measures a step in ``EVERY_STEPS`` and names the slowest ranks and their nodes."""

    def __init__(self) -> None:
        self._is_measured = False
        self._busy_s = self._wait_s = 0.0

    def before_run(self, run: Run) -> None:
        """Have every micro-batch schedule come by here before it sums gradients."""
        self._begins_at(run.step)
        configs = {id(config): config for config in map(get_model_config, run.stepper.chunks)}
        for config in configs.values():
            config.finalize_model_grads_func = self._meet_before(
                config.finalize_model_grads_func, run
            )

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Compare the ranks, when the step was measured."""
        if self._is_measured and run.groups.world_size > 1:
            self._compare(run, plan)
        self._begins_at(run.step)

    def _begins_at(self, step: int) -> None:
        self._is_measured = (step + 1) % EVERY_STEPS == 0

    def _meet_before(self, finalize: Callable[..., Any], run: Run) -> Callable[..., Any]:
        def meet_and_finalize(*args: Any, **kwargs: Any) -> Any:
            if self._is_measured:
                met_s = time.monotonic()
                self._busy_s = met_s - run.life.stage_began_s
                dist.barrier()
                self._wait_s = time.monotonic() - met_s
            return finalize(*args, **kwargs)

        return meet_and_finalize

    def _compare(self, run: Run, plan: StepPlan) -> None:
        own = torch.tensor([self._busy_s, self._wait_s], dtype=torch.float64)
        told = [torch.zeros(2, dtype=torch.float64) for _ in range(run.groups.world_size)]
        dist.all_gather(told, own)
        if run.groups.rank != 0:
            return
        busy_s, wait_s = [float(pair[0]) for pair in told], [float(pair[1]) for pair in told]
        middle_s, slowest = median(busy_s), max(range(len(busy_s)), key=busy_s.__getitem__)
        run.write(
            {
                "perf/slowest_rank": slowest,
                "perf/slowest_rank_ratio": busy_s[slowest] / middle_s,
                "perf/collective_wait_s": median(wait_s),
            },
            plan.phase,
        )
        slow = [rank for rank, busy in enumerate(busy_s) if busy > _SLOW * middle_s]
        if slow:
            log.warning("%s", told_slow(slow, busy_s, middle_s, run.life.incarnation.ranks_by_node))


def told_slow(
    slow: list[int], busy_s: list[float], middle_s: float, ranks_by_node: dict[str, list[int]]
) -> str:
    """The sentence that names slow ranks, the slowest first, and the nodes they are on."""
    node_of = {rank: node for node, ranks in ranks_by_node.items() for rank in ranks}
    worst = sorted(slow, key=lambda rank: -busy_s[rank])
    named = [
        f"rank {rank} on {node_of.get(rank, '?')} ({busy_s[rank] / middle_s:.1f} x)"
        for rank in worst[:_NAMED]
    ]
    more = f" and {len(worst) - _NAMED} more" if len(worst) > _NAMED else ""
    return f"slow ranks hold up the others (times the median of all): {', '.join(named)}{more}"
