"""One training step of a tiny model on any layout, with everything a parity test compares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_curr.models.gpt import PRECISIONS, build_gpt_chunks
from megatron_curr.parallel.context_split import split_for_context_parallel
from megatron_curr.parallel.full_tensors import (
    full_gradients,
    full_parameters,
    unequal_replicas,
)
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups
from megatron_curr.recipe.schema import Model, Parallel

SEQ_LENGTH = 32
MICRO_BATCH_SIZE = 1
NUM_SAMPLES = 4
VOCAB_SIZE = 250  # padded to 256


def tiny_model(**changes: Any) -> Model:
    settings = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "max_position_embeddings": 64,
        "make_vocab_size_divisible_by": 128,
        "init_method_std": 0.1,
    }
    return Model.model_validate({**settings, **changes})


def layout(
    *,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    vpp: int | None = None,
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    recompute: str | None = None,
) -> Parallel:
    return Parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sequence_parallel,
        use_distributed_optimizer=distributed_optimizer,
        recompute_granularity=recompute,
        micro_batch_tokens=SEQ_LENGTH * MICRO_BATCH_SIZE,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What one or more steps gave, whole, on every rank."""

    loss: float
    grad_norm: float
    first_weights: dict[str, Tensor]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    unequal_replicas: list[str]


def batch_of(sample: int, *, isolate_documents: bool) -> dict[str, Tensor | None]:
    """One micro-batch, a pure function of its place in the order, whole in the sequence."""
    generator = torch.Generator().manual_seed(sample)
    shape = (MICRO_BATCH_SIZE, SEQ_LENGTH)
    tokens = torch.randint(VOCAB_SIZE, shape, generator=generator)
    edge = int(torch.randint(1, SEQ_LENGTH, (1,), generator=generator))
    documents = (torch.arange(SEQ_LENGTH) >= edge).long().expand(shape)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, dims=1),
        "loss_mask": (torch.rand(shape, generator=generator) < 0.9).float(),
        "document_ids": documents if isolate_documents else None,
    }


def run_steps(
    parallel: Parallel,
    *,
    model: Model | None = None,
    precision: str = "fp32",
    num_steps: int = 1,
    isolate_documents: bool = False,
) -> Result:
    """Train ``num_steps`` steps; loss and gradients are the last one's. Collective."""
    groups = build_groups(parallel)
    chunks = build_gpt_chunks(
        model or tiny_model(),
        parallel=parallel,
        precision=precision,
        groups=groups,
        vocab_size=VOCAB_SIZE,
        isolate_documents=isolate_documents,
    )
    first_weights = full_parameters(chunks, groups)
    ddp = wrap(chunks, parallel)
    optimizer = build_optimizer(ddp, parallel, precision=precision)
    for step in range(num_steps):
        for chunk in ddp:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward_backward(ddp, groups, step=step, isolate_documents=isolate_documents)
        gradients = full_gradients(ddp, groups)
        finite, grad_norm, _ = optimizer.step()
        assert finite
    weights = full_parameters(ddp, groups)
    unequal = unequal_replicas(ddp, groups)
    destroy_groups()
    return Result(
        loss=loss,
        grad_norm=float(grad_norm),
        first_weights=first_weights,
        gradients=gradients,
        weights=weights,
        unequal_replicas=unequal,
    )


def wrap(chunks: list[nn.Module], parallel: Parallel) -> list[nn.Module]:
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_grad_reduce=False,
    )
    ddp = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_model_grads
    return ddp


def build_optimizer(
    ddp: list[nn.Module], parallel: Parallel, *, precision: str
) -> MegatronOptimizer:
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            weight_decay=0.1,
            clip_grad=1.0,
            bf16=precision == "bf16",
            params_dtype=PRECISIONS[precision],
            use_distributed_optimizer=parallel.use_distributed_optimizer,
        ),
        ddp,
        use_gloo_process_groups=False,
    )


def forward_backward(
    ddp: list[nn.Module], groups: Groups, *, step: int, isolate_documents: bool
) -> float:
    """Gradients of one global batch; the mean loss of its unmasked tokens, on every rank."""
    first = step * NUM_SAMPLES
    own = range(first + groups.dp_rank, first + NUM_SAMPLES, groups.dp_size)
    iterators = [
        (batch_of(sample, isolate_documents=isolate_documents) for sample in own) for _ in ddp
    ]
    stored = get_forward_backward_func()(
        forward_step_func=partial(forward_step, groups=groups),
        data_iterator=iterators if len(ddp) > 1 else iterators[0],
        model=ddp if len(ddp) > 1 else ddp[0],
        num_microbatches=len(own),
        seq_length=SEQ_LENGTH,
        micro_batch_size=MICRO_BATCH_SIZE,
        forward_only=False,
    )
    sums = torch.stack(stored).sum(0) if stored else torch.zeros(2, dtype=torch.float64)
    # Stored on the last stage only; tensor ranks hold equal copies, every other axis a part.
    dist.all_reduce(sums, group=groups.pg_collection.pp)
    dist.all_reduce(sums, group=groups.pg_collection.dp_cp)
    return float(sums[0] / sums[1])


def forward_step(
    iterator: Iterator[dict[str, Tensor | None]], chunk: nn.Module, *, groups: Groups
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    tokens, labels, loss_mask = (
        split_for_context_parallel(batch[name], groups)
        for name in ("tokens", "labels", "loss_mask")
    )
    losses_BS = chunk(tokens, None, batch["document_ids"], labels=labels)
    return losses_BS, partial(sum_loss, loss_mask)


def sum_loss(loss_mask_BS: Tensor, losses_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = (losses_BS.float() * loss_mask_BS).sum()
    num_tokens = loss_mask_BS.sum().to(torch.int)
    return loss, num_tokens, torch.stack([loss.detach().double(), num_tokens.double()])
