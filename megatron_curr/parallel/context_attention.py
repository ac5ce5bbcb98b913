"""Attention over a sequence that is dealt over the context-parallel ranks.

Here the exchange is an all-gather of keys and values: each rank gathers them whole, answers its own
two chunks of queries and, going back, reduce-scatters their gradients. Chunk j of the queries needs
the keys up to its own end only, so the work is the causal triangle, balanced over the ranks.

Legend: B micro-batch, S whole sequence, N query heads, G key/value heads (N a multiple of G),
H head dim. Suffixes are logical: a rank holds S / C positions as ``context_split`` deals them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_curr.parallel.context_split import chunks_of_rank, join_ranks, unjoin_ranks


def attention(
    q_SBNH: Tensor,
    k_SBGH: Tensor,
    v_SBGH: Tensor,
    *,
    softmax_scale: float,
    document_ids_BS: Tensor | None = None,
    is_causal: bool = True,
    cp_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Softmax attention, [S, B, N, H]; with ``cp_group``, over the sequence of all its ranks.

    ``document_ids_BS`` covers the whole sequence, on every rank alike. A token then attends only to
    tokens with its own id. Ids need not be ordered or consecutive.
    """
    cp_size = 1 if cp_group is None else cp_group.size()
    q_BNSH, k_BGSH, v_BGSH = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGH))
    if cp_size == 1:
        out_BNSH = _attend(
            q_BNSH,
            k_BGSH,
            v_BGSH,
            first_query=0,
            softmax_scale=softmax_scale,
            document_ids_BS=document_ids_BS,
            is_causal=is_causal,
        )
        return out_BNSH.permute(2, 0, 1, 3)
    key_value = torch.cat([k_SBGH, v_SBGH], dim=-1)
    key_value = _GatherSequence.apply(key_value, cp_group)
    k_BGSH, v_BGSH = key_value.permute(1, 2, 0, 3).split([k_SBGH.shape[-1], v_SBGH.shape[-1]], -1)
    chunk_length = q_SBNH.shape[0] // 2
    parts = [
        _attend(
            chunk_BNSH,
            k_BGSH,
            v_BGSH,
            first_query=chunk * chunk_length,
            softmax_scale=softmax_scale,
            document_ids_BS=document_ids_BS,
            is_causal=is_causal,
        )
        for chunk, chunk_BNSH in zip(
            chunks_of_rank(cp_group.rank(), cp_size), q_BNSH.chunk(2, dim=2), strict=True
        )
    ]
    return torch.cat(parts, dim=2).permute(2, 0, 1, 3)


def _attend(
    q_BNSH: Tensor,
    k_BGSH: Tensor,
    v_BGSH: Tensor,
    *,
    first_query: int,
    softmax_scale: float,
    document_ids_BS: Tensor | None,
    is_causal: bool,
) -> Tensor:
    """Consecutive queries, from position ``first_query`` on, against the keys they may see."""
    num_queries, num_keys = q_BNSH.shape[2], k_BGSH.shape[2]
    last = first_query + num_queries
    if is_causal and last < num_keys:
        k_BGSH, v_BGSH, num_keys = k_BGSH[:, :, :last], v_BGSH[:, :, :last], last
    visible = None
    if document_ids_BS is not None:
        ids_BS = document_ids_BS.to(q_BNSH.device)
        visible = ids_BS[:, None, first_query:last, None] == ids_BS[:, None, None, :num_keys]
    if is_causal and (visible is not None or first_query):
        queries = torch.arange(first_query, last, device=q_BNSH.device)[:, None]
        not_later = queries >= torch.arange(num_keys, device=q_BNSH.device)
        visible = not_later if visible is None else visible & not_later
    return scaled_dot_product_attention(
        q_BNSH,
        k_BGSH,
        v_BGSH,
        attn_mask=visible,
        is_causal=is_causal and visible is None,
        scale=softmax_scale,
        enable_gqa=q_BNSH.shape[1] != k_BGSH.shape[1],
    )


class _GatherSequence(torch.autograd.Function):
    """All ranks' sequence [S, ...] in order; backwards, the sum of their gradients of a part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        by_rank = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
        dist.all_gather_into_tensor(by_rank, part.contiguous(), group=group)
        return join_ranks(by_rank, cp_size=group.size(), dim=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        by_rank = unjoin_ranks(grad, cp_size=ctx.group.size(), dim=0).contiguous()
        part = by_rank.new_empty((by_rank.shape[0] // ctx.group.size(), *by_rank.shape[1:]))
        dist.reduce_scatter_tensor(part, by_rank, group=ctx.group)
        return part, None
