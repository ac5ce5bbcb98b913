"""Attention over a dealt sequence, by every exchange, against attention written out, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_curr.parallel import context_blocks
from megatron_curr.parallel.context_attention import attention
from megatron_curr.parallel.context_carriers import RingCarrier
from megatron_curr.parallel.context_exchange import (
    ContextExchange,
    build_exchange,
    build_hierarchical_groups,
)
from megatron_curr.parallel.context_split import split_sequence
from tests.ranks import run_ranks

SEQ_LENGTH, BATCH, SCALE = 48, 2, 0.2
TOLERANCE = 1e-10


@dataclass(frozen=True)
class Shape:
    heads: int
    groups: int
    head_dim: int
    value_dim: int


SHAPES = {
    "own keys for every head": Shape(12, 12, 8, 8),
    "grouped queries, head dim 24": Shape(24, 12, 24, 24),
    "values narrower than keys": Shape(12, 12, 12, 6),
}
ONE_GROUP = Shape(6, 1, 24, 24)


def written_out(
    q_SBNH: Tensor,
    k_SBGH: Tensor,
    v_SBGV: Tensor,
    *,
    causal: bool,
    documents_BS: Tensor | None,
    window: int | None = None,
) -> Tensor:
    repeats = q_SBNH.shape[2] // k_SBGH.shape[2]
    k_SBNH, v_SBNV = (x.repeat_interleave(repeats, dim=2) for x in (k_SBGH, v_SBGV))
    scores_BNST = torch.einsum("sbnh,tbnh->bnst", q_SBNH, k_SBNH) * SCALE
    length, batch = q_SBNH.shape[:2]
    positions = torch.arange(length)
    hidden = torch.zeros(batch, 1, length, length, dtype=torch.bool)
    if causal:
        hidden = hidden | (positions[:, None] < positions)
    if window is not None:
        hidden = hidden | (positions[:, None] - positions >= window)
    if documents_BS is not None:
        hidden = hidden | (documents_BS[:, None, :, None] != documents_BS[:, None, None, :])
    weights_BNST = scores_BNST.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bnst,tbnv->sbnv", weights_BNST, v_SBNV)


def some_documents() -> Tensor:
    """Documents of several lengths, edges inside chunks, an id that comes back, one token alone."""
    ids_BS = torch.zeros(BATCH, SEQ_LENGTH, dtype=torch.int64)
    ids_BS[0, 5:29], ids_BS[0, 29:30], ids_BS[1, 40:] = 7, 2, 9
    return ids_BS


def inputs(shape: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (SEQ_LENGTH, BATCH, heads, dim)
        for heads, dim in (
            (shape.heads, shape.head_dim),
            (shape.groups, shape.head_dim),
            (shape.groups, shape.value_dim),
            (shape.heads, shape.value_dim),
        )
    ]
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def exchanges(rank: int, cp_size: int) -> dict[str, ContextExchange | None]:
    if cp_size == 1:
        return {"none": None}
    every = {kind: build_exchange(kind, dist.group.WORLD) for kind in ("p2p", "all_gather", "a2a")}
    if cp_size == 4:
        levels = build_hierarchical_groups(dist.group.WORLD, (2, 2))
        every["a2a+p2p"] = build_exchange("a2a+p2p", dist.group.WORLD, hierarchical_groups=levels)
    return every


def equals_written_out(rank: int, tile_length: int, shapes: dict[str, Shape]) -> None:
    context_blocks.TILE_LENGTH = tile_length
    cp_size = dist.get_world_size()

    def part(whole: Tensor) -> Tensor:
        return split_sequence(whole, cp_rank=rank, cp_size=cp_size, dim=0)

    every = exchanges(rank, cp_size)
    kinds = ((True, None), (False, None), (True, 9))
    for shape, (causal, window), documents in product(
        shapes.values(), kinds, (None, some_documents())
    ):
        *whole, out_gradient = inputs(shape)
        leaves = [x.requires_grad_() for x in whole]
        expected = written_out(*leaves, causal=causal, documents_BS=documents, window=window)
        expected_gradients = torch.autograd.grad(expected, leaves, out_gradient)
        for name, exchange in every.items():
            if name.startswith("a2a") and shape.groups % cp_size:
                continue
            local = [part(x.detach()).requires_grad_() for x in whole]
            out = attention(
                *local,
                softmax_scale=SCALE,
                document_ids_BS=documents,
                is_causal=causal,
                window=window,
                exchange=exchange,
            )
            gradients = torch.autograd.grad(out, local, part(out_gradient))
            for ours, theirs in zip(
                (out, *gradients), (expected, *expected_gradients), strict=True
            ):
                error = (ours - part(theirs)).abs().max().item()
                assert error < TOLERANCE, (name, shape, causal, window, documents is None, error)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_every_exchange_equals_full_attention(cp_size: int) -> None:
    run_ranks(equals_written_out, cp_size, 512, {**SHAPES, "one group": ONE_GROUP})


def test_tiles_equal_full_attention() -> None:
    run_ranks(equals_written_out, 2, 5, SHAPES)


def padding_is_seen_by_no_token(rank: int) -> None:
    cp_size = dist.get_world_size()

    def part(whole: Tensor) -> Tensor:
        return split_sequence(whole, cp_rank=rank, cp_size=cp_size, dim=0)

    *whole, out_gradient = inputs(SHAPES["own keys for every head"])
    for num_tokens in (37, 20, 7):  # of 48; at 7 some ranks hold padding only
        leaves = [x.clone().requires_grad_() for x in whole]
        tokens = [x[:num_tokens] for x in leaves]
        expected = torch.zeros_like(leaves[0])
        expected[:num_tokens] = written_out(*tokens, causal=False, documents_BS=None)
        # What padded places themselves get is of no account.
        counts = (torch.arange(SEQ_LENGTH) < num_tokens)[:, None, None, None]
        gradients = torch.autograd.grad(expected, leaves, out_gradient * counts)
        for name, exchange in exchanges(rank, cp_size).items():
            local = [part(x).clone().requires_grad_() for x in whole]
            out = attention(
                *local,
                softmax_scale=SCALE,
                num_tokens=num_tokens,
                is_causal=False,
                exchange=exchange,
            )
            ours = torch.autograd.grad(out, local, part(out_gradient * counts))
            found, wanted = (out * part(counts), *ours), (expected, *gradients)
            for one, other in zip(found, wanted, strict=True):
                error = (one - part(other)).abs().max().item()
                assert error < TOLERANCE, (name, num_tokens, error)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_padding_is_seen_by_no_token_in_any_exchange(cp_size: int) -> None:
    run_ranks(padding_is_seen_by_no_token, cp_size)


def sum_of_outputs_has_gradients(rank: int) -> None:
    """The gradient of a sum is one number, stretched: kernels must not take it for rows."""
    shape = SHAPES["own keys for every head"]
    exchange = build_exchange("p2p", dist.group.WORLD)
    found = []
    for stretched in (True, False):
        *whole, _ = inputs(shape)
        local = [split_sequence(x, cp_rank=rank, cp_size=2, dim=0).requires_grad_() for x in whole]
        out = attention(*local, softmax_scale=SCALE, exchange=exchange)
        (out.sum() if stretched else (out * torch.ones_like(out)).sum()).backward()
        found.append([x.grad for x in local])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_gradient_may_be_stretched() -> None:
    run_ranks(sum_of_outputs_has_gradients, 2)


def saves_only_its_own(rank: int) -> None:
    cp_size, batch, length = 4, 1, 64
    heads, groups, dim = 8, 4, 8
    own = length // cp_size * batch * dim * 8  # of one head in float64, bytes
    limit = own * (heads + 2 * groups + heads) + length // cp_size * batch * heads * 8
    for name, exchange in exchanges(rank, cp_size).items():
        q, k, v = (
            torch.randn(length // cp_size, batch, n, dim, dtype=torch.float64).requires_grad_()
            for n in (heads, groups, groups)
        )
        kept: dict[int, int] = {}

        def keep(saved: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            attention(q, k, v, softmax_scale=SCALE, exchange=exchange)
        assert 0 < sum(kept.values()) <= limit, (name, kept, limit)


def test_passes_keep_nothing_of_another_rank() -> None:
    run_ranks(saves_only_its_own, 4)


def ring_uses_two_buffers(rank: int) -> None:
    own = torch.full((3,), float(rank))
    seen = {}
    for source, block in RingCarrier(dist.group.WORLD).blocks(own):
        assert block.tolist() == [float(source)] * 3
        seen[source] = block.data_ptr()
    assert len(seen) == 4 and seen.pop(rank) == own.data_ptr()
    assert len(set(seen.values())) == 2


def levels_are_neighbours_then_strides(rank: int) -> None:
    levels = build_hierarchical_groups(dist.group.WORLD, (2, 2))
    found = [dist.get_process_group_ranks(group) for group in levels]
    assert found == [[rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]]
    assert build_hierarchical_groups(dist.group.WORLD, (2, 2)) is levels


def blocks_and_groups(rank: int) -> None:
    ring_uses_two_buffers(rank)
    levels_are_neighbours_then_strides(rank)


def test_ring_receives_into_two_buffers_and_levels_are_megatron_cores() -> None:
    run_ranks(blocks_and_groups, 4)


def halves_agree(rank: int) -> None:
    cp_size = dist.get_world_size()
    shape = SHAPES["grouped queries, head dim 24"]
    *whole, out_gradient = inputs(shape)

    def results(dtype: torch.dtype, exchange: ContextExchange | None) -> list[Tensor]:
        def part(whole: Tensor) -> Tensor:
            size = 1 if exchange is None else cp_size
            place = rank if size > 1 else 0
            return split_sequence(whole, cp_rank=place, cp_size=size, dim=0).to(dtype)

        local = [part(x).requires_grad_() for x in whole]
        out = attention(
            *local, softmax_scale=SCALE, document_ids_BS=some_documents(), exchange=exchange
        )
        return [out, *torch.autograd.grad(out, local, part(out_gradient))]

    exact = results(torch.float64, None)
    for name, exchange in exchanges(rank, cp_size).items():
        for ours, theirs in zip(results(torch.bfloat16, exchange), exact, strict=True):
            part = split_sequence(theirs, cp_rank=rank, cp_size=cp_size, dim=0)
            error = ((ours.double() - part).norm() / part.norm()).item()
            assert ours.dtype is torch.bfloat16 and error < 8e-3, (name, error)


def test_bf16_agrees_to_its_precision() -> None:
    run_ranks(halves_agree, 4)
