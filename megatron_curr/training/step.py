"""One optimizer step: micro-batches through megatron-core's schedules, then the update.

Losses are sums over tokens; megatron-core divides the gradients by the number of tokens that carry
loss in the whole global batch, so neither the layout nor the micro-batch enters the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

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
from megatron_curr.data.loader import Batch
from megatron_curr.models.experts import expert_biases
from megatron_curr.parallel.context_split import split_for_context_parallel
from megatron_curr.parallel.groups import Groups


@dataclass(frozen=True)
class Loss:
    """Sums over a step or an evaluation, of all ranks; the same on every rank."""

    sum_by_source: tuple[float, ...]  # nats
    tokens_by_source: tuple[int, ...]  # tokens that carry loss
    flags: tuple[float, ...] = ()  # what ranks wanted each other to know, summed

    @property
    def mean(self) -> float:
        """Nats per token, over all sources."""
        return math.fsum(self.sum_by_source) / max(sum(self.tokens_by_source), 1)

    @property
    def is_finite(self) -> bool:
        """Whether no source's sum is infinite or not a number."""
        return all(map(math.isfinite, self.sum_by_source))

    def mean_of(self, source: int) -> float | None:
        """Nats per token of one source; None where it had no token."""
        tokens = self.tokens_by_source[source]
        return self.sum_by_source[source] / tokens if tokens else None


@dataclass(frozen=True)
class Update:
    """What became of a step."""

    grad_norm: float  # before clipping
    applied: bool


class Stepper:
    """Runs this rank's share of steps. ``chunks`` are its pipeline chunks, wrapped for DDP."""

    def __init__(
        self,
        chunks: Sequence[DistributedDataParallel],
        optimizer: ChainedOptimizer,
        *,
        groups: Groups,
        num_sources: int,
        clip_grad: float,
    ) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self._groups = groups
        self._num_sources = num_sources
        self._clip_grad = clip_grad
        self._run_schedule = get_forward_backward_func(
            groups.pp_size, len(self.chunks) if len(self.chunks) > 1 else None
        )
        self._expert_biases = expert_biases(self.chunks)
        self._expert_biases_before: list[Tensor] = []
        for chunk in self.chunks:
            get_model_config(chunk).finalize_model_grads_func = finalize_model_grads

    def forward_backward(self, batches: Sequence[Batch], *, flags: Sequence[float] = ()) -> Loss:
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
            shape=tuple(batches[0].tokens_BS.shape),
            num_sources=self._num_sources,
            forward_only=False,
        )
        return self._reduce(sums, self._num_sources, flags=flags)

    @torch.no_grad()
    def forward(
        self,
        batches: Callable[[], Iterator[Batch]],
        *,
        num_batches: int,
        shape: tuple[int, ...],
        num_sources: int,
    ) -> Loss:
        """Loss of this rank's batches and all others', in evaluation mode; leaves no trace.

        Collective. ``batches`` gives a new iterator for each pipeline chunk, ``shape`` is [B, S].
        """
        for chunk in self.chunks:
            chunk.eval()
        sums = self._pass(
            batches,
            num_batches=num_batches,
            shape=shape,
            num_sources=num_sources,
            forward_only=True,
        )
        for chunk in self.chunks:
            chunk.train()
        return self._reduce(sums, num_sources)

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
        return Update(grad_norm, applied=True)

    def _pass(
        self,
        batches: Callable[[], Iterator[Batch]],
        *,
        num_batches: int,
        shape: tuple[int, ...],
        num_sources: int,
        forward_only: bool,
    ) -> list[Tensor]:
        """[2, num_sources] of each micro-batch on the last pipeline stage; empty on the others."""
        micro_batch_size, seq_length = shape
        iterators = [batches() for _ in self.chunks]
        is_interleaved = len(self.chunks) > 1
        sums: list[Tensor] = self._run_schedule(
            forward_step_func=partial(self._forward_step, num_sources=num_sources),
            data_iterator=iterators if is_interleaved else iterators[0],
            model=self.chunks if is_interleaved else self.chunks[0],
            num_microbatches=num_batches,
            seq_length=seq_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        return sums

    def _forward_step(
        self, batches: Iterator[Batch], chunk: DistributedDataParallel, *, num_sources: int
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        batch = next(batches)
        device, groups = self._groups.device, self._groups
        mask_BS = split_for_context_parallel(batch.loss_mask_BS, groups).to(device)
        output = chunk(
            split_for_context_parallel(batch.tokens_BS, groups).to(device),
            None,  # RoPE counts for itself
            None if batch.document_ids_BS is None else batch.document_ids_BS.to(device),
            labels=split_for_context_parallel(batch.labels_BS, groups).to(device),
        )
        return output, partial(
            loss_sums,
            mask_BS=mask_BS,
            source_B=batch.source_index_B.to(device),
            num_sources=num_sources,
        )

    def _reduce(
        self, sums: Sequence[Tensor], num_sources: int, *, flags: Sequence[float] = ()
    ) -> Loss:
        """Add up the ranks; tensor-parallel ranks hold the same numbers, so one of them speaks."""
        count = num_sources
        totals = torch.zeros(
            2 * count + len(flags), dtype=torch.float64, device=self._groups.device
        )
        if sums and self._groups.tp_rank == 0:
            totals[: 2 * count] = torch.stack(sums).sum(dim=0).flatten()
        totals[2 * count :] = torch.tensor(flags, dtype=torch.float64)
        dist.all_reduce(totals)
        values = totals.tolist()
        return Loss(
            sum_by_source=tuple(values[:count]),
            tokens_by_source=tuple(round(value) for value in values[count : 2 * count]),
            flags=tuple(values[2 * count :]),
        )


def loss_sums(
    loss_BS: Tensor, *, mask_BS: Tensor, source_B: Tensor, num_sources: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum to differentiate, number of tokens, [2, num_sources] sums and tokens by source)."""
    mask_BS = mask_BS.to(torch.float32)
    masked_BS = loss_BS.float() * mask_BS
    by_source = torch.zeros(2, num_sources, dtype=torch.float64, device=loss_BS.device)
    by_source[0].index_add_(0, source_B, masked_BS.detach().sum(dim=1, dtype=torch.float64))
    by_source[1].index_add_(0, source_B, mask_BS.sum(dim=1, dtype=torch.float64))
    return masked_BS.sum(), mask_BS.sum().to(torch.int), by_source
