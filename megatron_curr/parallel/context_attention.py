"""Attention over a sequence that is dealt over the context-parallel ranks.

Four exchanges, named as megatron-core's ``cp_comm_type``, behind one call:

* ``p2p``: blocks of keys and values go round a ring. Memory falls as 1 / C.
* ``all_gather``: keys and values are gathered whole, in the forward and again in the backward pass.
* ``a2a``: an all-to-all gives each rank the whole sequence for a part of the heads.
* ``a2a+p2p``: the all-to-all among neighbours, the ring across them, for more ranks than heads
  (USP: Fang and Zhao 2024, arXiv:2405.07719).

All use the two-chunk split of ``context_split``, for full attention too: there the split changes
nothing but which positions a rank holds. Between the passes a rank keeps its queries, keys, values,
output and log sums, and nothing of another rank.

Legend: B micro-batch, S whole sequence, N query heads, G key/value heads (N a multiple of G),
R = N / G, H head dim of queries and keys, V head dim of values, X = B x G, C context-parallel
ranks, A ranks of the all-to-all. Suffixes are logical: a rank holds S / C positions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from megatron_curr.parallel.context_all_to_all import gather_heads, scatter_heads
from megatron_curr.parallel.context_blocks import (
    Attended,
    Deal,
    accumulation_dtype,
    attend,
    attend_backward,
)
from megatron_curr.parallel.context_carriers import (
    Carrier,
    GatherCarrier,
    LocalCarrier,
    RingCarrier,
)
from megatron_curr.parallel.context_exchange import ContextExchange


def attention(
    q_SBNH: Tensor,
    k_SBGH: Tensor,
    v_SBGV: Tensor,
    *,
    softmax_scale: float,
    document_ids_BS: Tensor | None = None,
    num_tokens: int | None = None,
    is_causal: bool = True,
    window: int | None = None,
    exchange: ContextExchange | None = None,
) -> Tensor:
    """Softmax attention, [S, B, N, V]; with ``exchange``, over the sequence of all its ranks.

    ``document_ids_BS`` covers the whole sequence, on every rank alike. A token then attends only to
    tokens with its own id. Ids need not be ordered or consecutive, but tiles of the score matrix
    are skipped by their least and greatest ids, so ordered ones save most. In full attention, what
    comes after the first ``num_tokens`` of the whole sequence is padding that nothing attends to.
    With a ``window``, for causal attention, a token sees that many, itself included.
    """
    assert num_tokens is None or (document_ids_BS is None and not is_causal)
    assert window is None or is_causal
    if exchange is None and document_ids_BS is None and window is None:
        k_SBGH, v_SBGV = k_SBGH[:num_tokens], v_SBGV[:num_tokens]
        return _on_one_rank(
            q_SBNH, k_SBGH, v_SBGV, softmax_scale=softmax_scale, is_causal=is_causal
        )
    exchange = exchange or ContextExchange(None, None, False)
    deal = Deal(
        rank=exchange.blocks_rank,
        size=exchange.blocks_size,
        softmax_scale=softmax_scale,
        is_causal=is_causal,
        document_ids_BS=document_ids_BS,
        num_tokens=num_tokens,
        window=window,
        # Past the all-to-all a rank holds the sequence of the ring's ranks alone.
        seq_length=len(q_SBNH) * exchange.blocks_size * exchange.all_to_all_size,
    )
    # Keys and values side by side are one message, and free the projection they are slices of.
    kv_SBGU = torch.cat([k_SBGH, v_SBGV], dim=-1)
    value_dim = v_SBGV.shape[-1]
    group = exchange.all_to_all_group
    if group is None:
        return _BlockAttention.apply(q_SBNH, kv_SBGU, value_dim, exchange, deal)
    q_SBNH, kv_SBGU = _scatter_together(q_SBNH, kv_SBGU, group=group)
    out_SBNV = _BlockAttention.apply(q_SBNH, kv_SBGU, value_dim, exchange, deal)
    return gather_heads(out_SBNV.flatten(2), group).flatten(2).unflatten(2, (-1, value_dim))


def _on_one_rank(
    q_SBNH: Tensor, k_SBGH: Tensor, v_SBGV: Tensor, *, softmax_scale: float, is_causal: bool
) -> Tensor:
    q_BNSH, k_BGSH, v_BGSV = (x.permute(1, 2, 0, 3) for x in (q_SBNH, k_SBGH, v_SBGV))
    out_BNSV = scaled_dot_product_attention(
        q_BNSH,
        k_BGSH,
        v_BGSV,
        is_causal=is_causal,
        scale=softmax_scale,
        enable_gqa=q_BNSH.shape[1] != k_BGSH.shape[1],
    )
    return out_BNSV.permute(2, 0, 1, 3)


def _scatter_together(
    q_SBNH: Tensor, kv_SBGU: Tensor, *, group: torch.distributed.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Both by one message: each rank's query heads beside the key/value heads they read."""
    num_heads, num_groups, size = q_SBNH.shape[2], kv_SBGU.shape[2], group.size()
    assert num_groups % size == 0, (num_heads, num_groups, size)
    by_rank = [x.unflatten(2, (size, -1)).flatten(3) for x in (q_SBNH, kv_SBGU)]
    widths = [x.shape[3] for x in by_rank]
    q_SBW, kv_SBW = scatter_heads(torch.cat(by_rank, dim=3), group).split(widths, dim=2)
    return (
        q_SBW.unflatten(2, (num_heads // size, -1)),
        kv_SBW.unflatten(2, (num_groups // size, -1)),
    )


def _carrier(exchange: ContextExchange) -> Carrier:
    if exchange.blocks_group is None:
        return LocalCarrier()
    if exchange.gathers_blocks:
        return GatherCarrier(exchange.blocks_group)
    return RingCarrier(exchange.blocks_group)


def _by_group(x_SBNH: Tensor, num_groups: int) -> Tensor:
    """Query heads by the key/value head they read: [S, B, N, H] to [X, R, S, H]."""
    length, batch, num_heads, dim = x_SBNH.shape
    x_SXRH = x_SBNH.reshape(length, batch * num_groups, num_heads // num_groups, dim)
    return x_SXRH.permute(1, 2, 0, 3)


def _by_head(x_XRSH: Tensor, batch: int) -> Tensor:
    """Inverse of ``_by_group``."""
    _, _, length, dim = x_XRSH.shape
    return x_XRSH.permute(2, 0, 1, 3).reshape(length, batch, -1, dim)


def _keys_and_values(kv_SBGU: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
    """Views [X, S, H] and [X, S, V] of keys and values that lie side by side."""
    kv_XSU = kv_SBGU.flatten(1, 2).transpose(0, 1)
    k_XSH, v_XSV = kv_XSU.split([kv_XSU.shape[-1] - value_dim, value_dim], dim=-1)
    return k_XSH, v_XSV


class _BlockAttention(torch.autograd.Function):
    """Attention of this rank's queries over the blocks that a carrier brings, own memory only."""

    @staticmethod
    def forward(
        ctx: Any,
        q_SBNH: Tensor,
        kv_SBGU: Tensor,
        value_dim: int,
        exchange: ContextExchange,
        deal: Deal,
    ) -> Tensor:
        q_XRSH = _by_group(q_SBNH, kv_SBGU.shape[2])
        attended = Attended(q_XRSH, value_dim)
        for source, block_SBGU in _carrier(exchange).blocks(kv_SBGU):
            key_value = _keys_and_values(block_SBGU, value_dim)
            attend(q_XRSH, key_value, attended, deal=deal, source=source)
        out_SBNV = _by_head(attended.out_XRSV.to(q_SBNH.dtype), q_SBNH.shape[1])
        ctx.save_for_backward(q_SBNH, kv_SBGU, out_SBNV, attended.lse_XRS)
        ctx.value_dim, ctx.exchange, ctx.deal = value_dim, exchange, deal
        return out_SBNV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_SBNV: Tensor) -> tuple[Tensor | None, ...]:
        q_SBNH, kv_SBGU, out_SBNV, lse_XRS = ctx.saved_tensors
        num_groups, value_dim = kv_SBGU.shape[2], ctx.value_dim
        q_XRSH, dout_XRSV, out_XRSV = (
            _by_group(x, num_groups) for x in (q_SBNH, dout_SBNV.contiguous(), out_SBNV)
        )
        dtype = accumulation_dtype(q_SBNH.dtype)
        dq_XRSH = torch.zeros_like(q_XRSH, dtype=dtype)
        carrier = _carrier(ctx.exchange)
        for source, block_SBGU in carrier.blocks(kv_SBGU):
            room = partial(carrier.room, source, block_SBGU, dtype)
            attend_backward(
                q_XRSH,
                _keys_and_values(block_SBGU, value_dim),
                attended=(dout_XRSV, out_XRSV, lse_XRS),
                dq_XRSH=dq_XRSH,
                room=lambda room=room: _keys_and_values(room(), value_dim),
                deal=ctx.deal,
                source=source,
            )
            room()  # a block with no score to count is sent on all the same
            carrier.give(source)
        dq_SBNH = _by_head(dq_XRSH.to(q_SBNH.dtype), q_SBNH.shape[1])
        return dq_SBNH, carrier.collect().to(kv_SBGU.dtype), None, None, None
