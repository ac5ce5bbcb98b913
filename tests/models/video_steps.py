"""One training step of a tiny video transformer on any layout, as a parity test compares it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_curr.models.patches import Grid, local_frame_mask, local_patches
from megatron_curr.models.video_dit import VideoDiT as VideoDiTChunk
from megatron_curr.models.video_dit import build_video_dit_chunks
from megatron_curr.parallel.full_tensors import (
    full_gradients,
    full_parameters,
    unequal_replicas,
)
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.video_model import VideoDiT
from tests.models.videos import Videos, shake, tiny_dit, videos
from tests.parallel.layouts import Result, build_optimizer, wrap

# Neither 3 x 2 x 3 + 2 nor 1 x 2 x 2 + 2 is a multiple of eight; micro-batches differ in length.
SHAPES = ((3, 4, 6), (1, 4, 4))
NUM_SAMPLES = 4


def run_video_steps(
    parallel: Parallel,
    *,
    model: VideoDiT | None = None,
    precision: str = "fp32",
    num_steps: int = 1,
    change: Callable[[VideoDiTChunk], None] = lambda chunk: None,
) -> Result:
    """Train ``num_steps`` steps; loss and gradients are the last one's. Collective.

    ``change`` is done to each chunk before it is wrapped.
    """
    model = model or tiny_dit()
    groups = build_groups(parallel)
    chunks = build_video_dit_chunks(model, parallel=parallel, precision=precision, groups=groups)
    first_weights = full_parameters(chunks, groups)
    for chunk in chunks:
        shake(chunk, groups)
        change(chunk)
    ddp = wrap(chunks, parallel)
    optimizer = build_optimizer(ddp, parallel, precision=precision)
    for step in range(num_steps):
        for chunk in ddp:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = forward_backward(ddp, groups, model, step=step)
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
        expert_biases={},
    )


def forward_backward(ddp: list[nn.Module], groups: Groups, model: VideoDiT, *, step: int) -> float:
    """Gradients of one global batch; the mean loss of its samples, on every rank."""
    first = step * NUM_SAMPLES
    own = range(first + groups.dp_rank, first + NUM_SAMPLES, groups.dp_size)
    batches = [videos(model, *SHAPES[sample // 2 % 2], samples=(sample,)) for sample in own]
    stored = get_forward_backward_func()(
        forward_step_func=partial(forward_step, groups=groups, model=model),
        data_iterator=[iter(batches) for _ in ddp] if len(ddp) > 1 else iter(batches),
        model=ddp if len(ddp) > 1 else ddp[0],
        num_microbatches=len(batches),
        seq_length=1,  # of no account: stages tell each other
        micro_batch_size=1,
        forward_only=False,
    )
    sums = torch.stack(stored).sum(0) if stored else torch.zeros(2, dtype=torch.float64)
    # Stored on the last stage only; tensor ranks hold equal copies, every other axis a part.
    dist.all_reduce(sums, group=groups.pg_collection.pp)
    dist.all_reduce(sums, group=groups.pg_collection.dp_cp)
    return float(sums[0] / sums[1])


def forward_step(
    iterator: Iterator[Videos], chunk: nn.Module, *, groups: Groups, model: VideoDiT
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = chunk(**batch.arguments())
    return output, partial(sum_loss, batch=batch, groups=groups, model=model)


def sum_loss(
    output_BSK: Tensor, *, batch: Videos, groups: Groups, model: VideoDiT
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean squared error of each sample's noised frames, summed over samples; their number."""
    grid = Grid.of(batch.latents_BCTYX.shape, model.patch)
    mask_BS = local_frame_mask(batch.frame_mask_BT, grid=grid, groups=groups)
    target = local_patches(batch.latents_BCTYX, patch=model.patch, groups=groups)
    by_position = partial(Tensor.unflatten, dim=-1)
    predicted = by_position(output_BSK, sizes=(model.patch_volume, -1))[..., : model.in_channels]
    error_BS = (predicted - by_position(target, sizes=(model.patch_volume, -1))).square()
    error_BS = error_BS.mean((-1, -2)) * mask_BS
    patches_B = batch.frame_mask_BT.sum(1) * grid.rows * grid.columns
    loss = (error_BS.sum(1) / patches_B).sum()
    count = torch.tensor(len(patches_B) if groups.cp_rank == 0 else 0, dtype=torch.int)
    return loss, count, torch.stack([loss.detach().double(), count.double()])
