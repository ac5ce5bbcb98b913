"""From a part of the sequence with all heads to all of the sequence with a part of the heads.

DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509). Query heads and key/value heads are dealt
in the same order, so a rank that gets key/value heads gets the query heads that read them.

Legend: S sequence, B micro-batch, A ranks of the group, W what one rank gets of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_curr.parallel.context_split import join_ranks, unjoin_ranks


def scatter_heads(x_SBAW: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[S/A, B, A, W] of this rank's positions to [S, B, W] of this rank's heads, in order."""
    return _ScatterHeads.apply(x_SBAW, group)


def gather_heads(x_SBW: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Inverse of ``scatter_heads``."""
    return _GatherHeads.apply(x_SBW, group)


def _scatter(x_SBAW: Tensor, group: dist.ProcessGroup) -> Tensor:
    outgoing_ASBW = x_SBAW.permute(2, 0, 1, 3).contiguous()
    by_rank_ASBW = torch.empty_like(outgoing_ASBW)
    dist.all_to_all_single(by_rank_ASBW, outgoing_ASBW, group=group)
    return join_ranks(by_rank_ASBW.flatten(0, 1), cp_size=group.size(), dim=0)


def _gather(x_SBW: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = group.size()
    outgoing_ASBW = unjoin_ranks(x_SBW, cp_size=size, dim=0).unflatten(0, (size, -1))
    by_rank_ASBW = torch.empty_like(outgoing_ASBW)
    dist.all_to_all_single(by_rank_ASBW, outgoing_ASBW, group=group)
    return by_rank_ASBW.permute(1, 2, 0, 3)


class _ScatterHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBAW: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _scatter(x_SBAW, group)

    @staticmethod
    def backward(ctx: Any, grad_SBW: Tensor) -> tuple[Tensor, None]:
        return _gather(grad_SBW, ctx.group), None


class _GatherHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBW: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _gather(x_SBW, group)

    @staticmethod
    def backward(ctx: Any, grad_SBAW: Tensor) -> tuple[Tensor, None]:
        return _scatter(grad_SBAW, ctx.group), None
