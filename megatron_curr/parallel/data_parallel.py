"""Model chunks wrapped so that gradients are summed over the data- and context-parallel ranks.

With ``overlap_grad_reduce`` a bucket of gradients is reduced as soon as the backward pass has
filled it; with ``overlap_param_gather`` (distributed optimizer) updated weights are gathered as the
next forward pass comes to them. Until then a rank holds old values of other ranks' shards: whoever
reads weights between an update and a forward pass calls ``finish_param_gather`` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

if TYPE_CHECKING:
    from megatron_curr.recipe.parallel import Parallel


def wrap_for_data_parallel(
    chunks: Sequence[nn.Module], *, parallel: Parallel, bucket_size: int | None = None
) -> list[DistributedDataParallel]:
    """This rank's pipeline chunks for the schedules; ``bucket_size`` weights to a bucket.

    Buckets matter where communication overlaps; the default is megatron-core's, 40 million or more.
    """
    wrapped = [
        DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                bucket_size=bucket_size,
            ),
            chunk,
            # Later chunks of interleaved stages: their communication is off the critical path.
            disable_bucketing=index > 0,
        )
        for index, chunk in enumerate(chunks)
    ]
    if parallel.overlap_grad_reduce:
        functions = [chunk.no_sync for chunk in wrapped]
        for chunk in wrapped:
            chunk.config.no_sync_func = functions if len(wrapped) > 1 else functions[0]
    return wrapped


def finish_param_gather(chunks: Sequence[nn.Module]) -> None:
    """Have every rank hold the updated weights. Collective where updates are gathered late."""
    for chunk in chunks:
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
