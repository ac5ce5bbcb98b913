"""One optimizer step: micro-batches through megatron-core's schedules, then the update.

Losses are sums; megatron-core divides the gradients by the count of the whole global batch, so
neither the layout nor the micro-batch enters the result. What is summed is the objective's affair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from megatron_curr.curriculum.schedule import StepPlan
from megatron_curr.models.experts import expert_biases
from megatron_curr.parallel.groups import Groups
from megatron_curr.training.objectives import LossFunction, Objective
from megatron_curr.training.optimizer_state import move_average


@dataclass(frozen=True)
class Loss:
    """Sums over a step or an evaluation, of all ranks; the same on every rank.

    What is summed and counted, and by which groups, is the objective's: nats of tokens by source,
    or squared errors of samples by source and shape.
    """

    sum_by_group: tuple[float, ...]
    count_by_group: tuple[int, ...]
    flags: tuple[float, ...] = ()  # what ranks wanted each other to know, summed

    @property
    def is_empty(self) -> bool:
        """Whether nothing counted: no token carried loss, so there is no loss and no gradient."""
        return not any(self.count_by_group)

    @property
    def mean(self) -> float | None:
        """Nats per token, or mean squared error, over all groups; None where nothing counts."""
        return self.mean_of(*range(len(self.count_by_group)))

    @property
    def is_finite(self) -> bool:
        """Whether no group's sum is infinite or not a number."""
        return all(map(math.isfinite, self.sum_by_group))

    def mean_of(self, *groups: int) -> float | None:
        """The mean of some groups together; None where they had nothing that counts."""
        count = sum(self.count_by_group[group] for group in groups)
        return math.fsum(self.sum_by_group[group] for group in groups) / count if count else None


@dataclass(frozen=True)
class Update:
    """What became of a step."""

    grad_norm: float  # before clipping
    applied: bool


class Stepper:
    """Runs this rank's share of steps. ``chunks`` are its pipeline chunks, wrapped for DDP.

    ``ema_decay`` keeps a moving average of the weights, moved with every update.
    """

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        *,
        groups: Groups,
        objective: Objective,
        num_groups: int,
        clip_grad: float,
        ema_decay: float | None = None,
    ) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self._groups = groups
        self.num_groups = num_groups
        self._clip_grad = clip_grad
        self._objective = objective
        self._ema_decay = ema_decay
        self._run_schedule = get_forward_backward_func(
            groups.pp_size, len(self.chunks) if len(self.chunks) > 1 else None
        )
        self._expert_biases = expert_biases(self.chunks)
        self._expert_biases_before: list[Tensor] = []
        for chunk in self.chunks:
            get_model_config(chunk).finalize_model_grads_func = finalize_model_grads

    def forward_backward(self, batches: Sequence[Any], *, flags: Sequence[float] = ()) -> Loss:
        """Gradients of the global batch, ready for an update, and its loss. Collective.

        ``flags`` are added up over the ranks beside the loss, at no cost of their own.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self._expert_biases_before = [bias.clone() for bias in self._expert_biases]
        sums = self._pass(
            lambda: iter(batches),
            num_batches=len(batches),
            num_groups=self.num_groups,
            forward_only=False,
        )
        return self._reduce(sums, self.num_groups, flags=flags)

    @torch.no_grad()
    def forward(
        self,
        batches: Callable[[], Iterator[Any]],
        *,
        num_batches: int,
        num_groups: int,
    ) -> Loss:
        """Loss of this rank's batches and all others', in evaluation mode; leaves no trace.

        Collective. ``batches`` gives a new iterator for each pipeline chunk.
        """
        for chunk in self.chunks:
            chunk.eval()
        sums = self._pass(
            batches,
            num_batches=num_batches,
            num_groups=num_groups,
            forward_only=True,
        )
        for chunk in self.chunks:
            chunk.train()
        return self._reduce(sums, num_groups)

    def update(self, plan: StepPlan, loss: Loss) -> Update:
        """Clip and apply the gradients; a non-finite loss or gradient leaves all as it was."""
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not (loss.is_finite and math.isfinite(grad_norm)):
            # Moved together with the gradients, before anybody could know.
            for bias, before in zip(self._expert_biases, self._expert_biases_before, strict=True):
                bias.copy_(before)
            return Update(grad_norm, applied=False)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate * group["lr_mult"]
            group["weight_decay"] = plan.weight_decay * group["wd_mult"]
        for part in self.optimizer.chained_optimizers:
            if not part.is_stub_optimizer:
                clip_grad_by_total_norm_fp32(
                    part.get_parameters(), max_norm=self._clip_grad, total_norm=grad_norm
                )
        self.optimizer.step_with_ready_grads()
        if self._ema_decay is not None:
            move_average(self.optimizer, self._ema_decay)
        return Update(grad_norm, applied=True)

    def _pass(
        self,
        batches: Callable[[], Iterator[Any]],
        *,
        num_batches: int,
        num_groups: int,
        forward_only: bool,
    ) -> list[Tensor]:
        """[2, num_groups] of each micro-batch on the last pipeline stage; empty on the others."""
        first, *iterators = [batches() for _ in range(1 + len(self.chunks))]
        micro_batch_size, seq_length = self._objective.shape(next(first))
        is_interleaved = len(self.chunks) > 1
        sums: list[Tensor] = self._run_schedule(
            forward_step_func=partial(self._forward_step, num_groups=num_groups),
            data_iterator=iterators if is_interleaved else iterators[0],
            model=self.chunks if is_interleaved else self.chunks[0],
            num_microbatches=num_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        return sums

    def _forward_step(
        self, batches: Iterator[Any], chunk: DistributedDataParallel, *, num_groups: int
    ) -> tuple[Tensor, LossFunction]:
        return self._objective.forward(chunk, next(batches), num_groups=num_groups)

    def _reduce(
        self, sums: Sequence[Tensor], num_groups: int, *, flags: Sequence[float] = ()
    ) -> Loss:
        """Add up the ranks; tensor-parallel ranks hold the same numbers, so one of them speaks."""
        count = num_groups
        totals = torch.zeros(
            2 * count + len(flags), dtype=torch.float64, device=self._groups.device
        )
        if sums and self._groups.tp_rank == 0:
            totals[: 2 * count] = torch.stack(sums).sum(dim=0).flatten()
        totals[2 * count :] = torch.tensor(flags, dtype=torch.float64)
        dist.all_reduce(totals)
        values = totals.tolist()
        return Loss(
            sum_by_group=tuple(values[:count]),
            count_by_group=tuple(round(value) for value in values[count : 2 * count]),
            flags=tuple(values[2 * count :]),
        )
