"""How a sequence is dealt over the context-parallel ranks.

The sequence is cut into 2 C chunks of equal length and rank r of C holds chunks r and 2C - 1 - r,
so that under causal attention every rank has the same work. megatron-core slices its rotary
embeddings the same way (``get_pos_emb_on_this_cp_rank``).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_curr.errors import RecipeError
from megatron_curr.parallel.groups import Groups


def chunks_of_rank(cp_rank: int, cp_size: int) -> tuple[int, int]:
    """The two chunks, of ``2 * cp_size``, that a rank holds, in the order it holds them."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def local_positions(seq_length: int, *, cp_rank: int, cp_size: int) -> Tensor:
    """Places in the whole sequence of a rank's tokens, [seq_length / cp_size]."""
    if cp_size == 1:
        return torch.arange(seq_length)
    _check_length(seq_length, cp_size)
    chunks = torch.arange(seq_length).chunk(2 * cp_size)
    return torch.cat([chunks[index] for index in chunks_of_rank(cp_rank, cp_size)])


def count_before(end: int, *, seq_length: int, cp_rank: int, cp_size: int) -> int:
    """How many of a rank's tokens lie before place ``end`` of the whole: its first ones."""
    if cp_size == 1:
        return min(end, seq_length)
    chunk_length = seq_length // (2 * cp_size)
    return sum(
        min(max(end - chunk * chunk_length, 0), chunk_length)
        for chunk in chunks_of_rank(cp_rank, cp_size)
    )


def split_sequence(whole: Tensor, *, cp_rank: int, cp_size: int, dim: int) -> Tensor:
    """A rank's part of the whole sequence along ``dim``; no communication."""
    if cp_size == 1:
        return whole
    _check_length(whole.shape[dim], cp_size)
    chunks = whole.chunk(2 * cp_size, dim=dim)
    return torch.cat([chunks[index] for index in chunks_of_rank(cp_rank, cp_size)], dim=dim)


def join_ranks(by_rank: Tensor, *, cp_size: int, dim: int) -> Tensor:
    """The whole sequence from the ranks' parts laid end to end along ``dim``."""
    if cp_size == 1:
        return by_rank
    chunks = by_rank.chunk(2 * cp_size, dim=dim)
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])], dim=dim)


def unjoin_ranks(whole: Tensor, *, cp_size: int, dim: int) -> Tensor:
    """Inverse of ``join_ranks``: every rank's part, end to end in rank order."""
    if cp_size == 1:
        return whole
    chunks = whole.chunk(2 * cp_size, dim=dim)
    parts = [chunks[index] for rank in range(cp_size) for index in chunks_of_rank(rank, cp_size)]
    return torch.cat(parts, dim=dim)


def split_for_context_parallel(whole: Tensor, groups: Groups, *, dim: int = 1) -> Tensor:
    """This context-parallel rank's part of a batch, for tensors [B, S] (``dim`` 1) or [S, ...]."""
    return split_sequence(whole, cp_rank=groups.cp_rank, cp_size=groups.cp_size, dim=dim)


def gather_from_context_parallel(part: Tensor, groups: Groups, *, dim: int = 1) -> Tensor:
    """The whole sequence from every rank's part; carries no gradient. Collective."""
    if groups.cp_size == 1:
        return part
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(groups.cp_size)]
    dist.all_gather(parts, part, group=groups.pg_collection.cp)
    return join_ranks(torch.cat(parts, dim=dim), cp_size=groups.cp_size, dim=dim)


def _check_length(seq_length: int, cp_size: int) -> None:
    if seq_length % (2 * cp_size):
        fits = max(seq_length // (2 * cp_size), 1) * 2 * cp_size
        raise RecipeError(
            f"seq_length={seq_length} must be a multiple of 2 x context_parallel_size="
            f"{2 * cp_size}, because every rank holds two chunks of equal length; use {fits}"
        )
