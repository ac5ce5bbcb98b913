"""One training step of a tiny model on any layout, with everything a parity test compares."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn

from megatron_curr.models.gpt import build_gpt_chunks
from megatron_curr.models.layout_settings import PRECISIONS
from megatron_curr.parallel.context_split import split_for_context_parallel
from megatron_curr.parallel.data_parallel import wrap_for_data_parallel
from megatron_curr.parallel.full_tensors import (
    full_gradients,
    full_parameters,
    unequal_replicas,
)
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.training.parity import soften_adam

SEQ_LENGTH = 32
MICRO_BATCH_SIZE = 1
NUM_SAMPLES = 4
VOCAB_SIZE = 250  # padded to 256
CLIP_GRAD = 1.0


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
    ep: int = 1,
    etp: int | None = None,
    vpp: int | None = None,
    sequence_parallel: bool = False,
    distributed_optimizer: bool = False,
    recompute: str | None = None,
    micro_batch_size: int = MICRO_BATCH_SIZE,
    **more: Any,
) -> Parallel:
    return Parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sequence_parallel,
        use_distributed_optimizer=distributed_optimizer,
        recompute_granularity=recompute,
        micro_batch_tokens=SEQ_LENGTH * micro_batch_size,
        **more,
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
    expert_biases: dict[str, Tensor]


def batch_of(samples: Sequence[int], *, isolate_documents: bool) -> dict[str, Tensor | None]:
    """One micro-batch, a pure function of its places in the order, whole in the sequence."""
    rows = [row_of(sample, isolate_documents=isolate_documents) for sample in samples]
    return {
        name: None if rows[0][name] is None else torch.cat([row[name] for row in rows])
        for name in rows[0]
    }


def row_of(sample: int, *, isolate_documents: bool) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(sample)
    shape = (1, SEQ_LENGTH)
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
    bucket_size: int | None = None,
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
    ddp = wrap(chunks, parallel, bucket_size=bucket_size)
    optimizer = build_optimizer(ddp, parallel, precision=precision)
    for step in range(num_steps):
        for chunk in ddp:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward_backward(
            ddp,
            groups,
            step=step,
            isolate_documents=isolate_documents,
            micro_batch_size=parallel.micro_batch_tokens // SEQ_LENGTH,
        )
        gradients = full_gradients(ddp, groups)
        if step == 0:
            soften_adam(optimizer, gradients, clip_grad=CLIP_GRAD)
        finite, grad_norm, _ = optimizer.step()
        assert finite
    weights = full_parameters(ddp, groups)
    unequal = unequal_replicas(ddp, groups)
    biases = gathered_expert_biases(chunks)
    destroy_groups()
    return Result(
        loss=loss,
        grad_norm=float(grad_norm),
        first_weights=first_weights,
        gradients=gradients,
        weights=weights,
        unequal_replicas=unequal,
        expert_biases=biases,
    )


def gathered_expert_biases(chunks: list[nn.Module]) -> dict[str, Tensor]:
    """The routers' biases by layer; every rank that has a router must have the same."""
    mine = {
        f"layer {module.layer_number}": module.expert_bias
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, TopKRouter) and module.expert_bias is not None
    }
    everyone: list[dict[str, Tensor] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, Tensor] = {}
    for other in everyone:
        for name, bias in (other or {}).items():
            assert torch.equal(whole.setdefault(name, bias), bias), f"bias of {name} differs"
    return whole


def wrap(
    chunks: list[nn.Module], parallel: Parallel, *, bucket_size: int | None = None
) -> list[nn.Module]:
    ddp = wrap_for_data_parallel(chunks, parallel=parallel, bucket_size=bucket_size)
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
            clip_grad=CLIP_GRAD,
            bf16=precision == "bf16",
            params_dtype=PRECISIONS[precision],
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        ddp,
        use_gloo_process_groups=False,
    )


def forward_backward(
    ddp: list[nn.Module],
    groups: Groups,
    *,
    step: int,
    isolate_documents: bool,
    micro_batch_size: int = MICRO_BATCH_SIZE,
) -> float:
    """Gradients of one global batch; the mean loss of its unmasked tokens, on every rank."""
    first = step * NUM_SAMPLES
    own = range(first + groups.dp_rank, first + NUM_SAMPLES, groups.dp_size)
    micro_batches = [
        own[start : start + micro_batch_size] for start in range(0, len(own), micro_batch_size)
    ]
    iterators = [
        (batch_of(samples, isolate_documents=isolate_documents) for samples in micro_batches)
        for _ in ddp
    ]
    stored = get_forward_backward_func()(
        forward_step_func=partial(forward_step, groups=groups),
        data_iterator=iterators if len(ddp) > 1 else iterators[0],
        model=ddp if len(ddp) > 1 else ddp[0],
        num_microbatches=len(micro_batches),
        seq_length=SEQ_LENGTH,
        micro_batch_size=micro_batch_size,
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
