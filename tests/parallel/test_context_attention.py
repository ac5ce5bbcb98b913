"""Attention over a dealt sequence against attention written out, in float64."""

from __future__ import annotations

from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_curr.parallel.context_attention import attention
from megatron_curr.parallel.context_split import split_sequence
from tests.ranks import run_ranks

SEQ_LENGTH, BATCH, HEADS, GROUPS, HEAD_DIM = 48, 2, 6, 2, 24
SCALE = 0.2
TOLERANCE = 1e-10


def written_out(
    q_SBNH: Tensor, k_SBGH: Tensor, v_SBGH: Tensor, *, causal: bool, documents_BS: Tensor | None
) -> Tensor:
    k_SBNH, v_SBNH = (x.repeat_interleave(HEADS // GROUPS, dim=2) for x in (k_SBGH, v_SBGH))
    scores_BNST = torch.einsum("sbnh,tbnh->bnst", q_SBNH, k_SBNH) * SCALE
    positions = torch.arange(SEQ_LENGTH)
    hidden = torch.zeros(BATCH, 1, SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool)
    if causal:
        hidden = hidden | (positions[:, None] < positions)
    if documents_BS is not None:
        hidden = hidden | (documents_BS[:, None, :, None] != documents_BS[:, None, None, :])
    weights_BNST = scores_BNST.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bnst,tbnh->sbnh", weights_BNST, v_SBNH)


def equals_written_out(rank: int) -> None:
    cp_size = dist.get_world_size()
    generator = torch.Generator().manual_seed(0)

    def whole(heads: int) -> Tensor:
        shape = (SEQ_LENGTH, BATCH, heads, HEAD_DIM)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = (whole(HEADS), whole(GROUPS), whole(GROUPS))
    out_gradient = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
    # Documents of several lengths, edges inside chunks, an id that comes back, one token alone.
    documents_BS = torch.zeros(BATCH, SEQ_LENGTH, dtype=torch.int64)
    documents_BS[0, 5:29], documents_BS[0, 29:30], documents_BS[1, 40:] = 7, 2, 9

    def part(whole: Tensor) -> Tensor:
        return split_sequence(whole, cp_rank=rank, cp_size=cp_size, dim=0)

    for causal, documents in product((True, False), (None, documents_BS)):
        expected = written_out(*inputs, causal=causal, documents_BS=documents)
        expected_gradients = torch.autograd.grad(expected, inputs, out_gradient)
        local = [part(x.detach()).requires_grad_() for x in inputs]
        out = attention(
            *local,
            softmax_scale=SCALE,
            document_ids_BS=documents,
            is_causal=causal,
            cp_group=dist.group.WORLD,
        )
        gradients = torch.autograd.grad(out, local, part(out_gradient))
        for ours, theirs in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            torch.testing.assert_close(ours, part(theirs), rtol=TOLERANCE, atol=TOLERANCE)


def test_one_rank() -> None:
    run_ranks(equals_written_out, 1)


def test_sequence_over_three_ranks() -> None:
    run_ranks(equals_written_out, 3)
