"""Every score that counts is computed once, on one rank, and the ranks have equal work."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_curr.parallel import context_blocks
from megatron_curr.parallel.context_blocks import Block, Deal, _joined, _tiles
from megatron_curr.parallel.context_split import local_positions

LENGTH = 48


def blocks_of(deal: Deal, source: int, *, join: bool) -> list[Block]:
    block = deal.block(source, length=LENGTH // deal.size)
    ids, key_ids = deal.ids_of(deal.rank), deal.ids_of(source)
    if ids is None or key_ids is None:
        return [block]
    assert block.queries.start is not None
    tiles = _tiles(block, ids[:, block.queries], key_ids[:, block.keys], deal=deal, source=source)
    return list(_joined(tiles) if join else tiles)


def times_computed(size: int, documents_BS: Tensor | None, *, causal: bool, join: bool) -> Tensor:
    """How often each score [S, S] counts, over all ranks; as the masks say, not as they should."""
    counts = torch.zeros(LENGTH, LENGTH, dtype=torch.int64)
    for rank in range(size):
        deal = Deal(
            rank=rank, size=size, softmax_scale=1.0, is_causal=causal, document_ids_BS=documents_BS
        )
        queries = local_positions(LENGTH, cp_rank=rank, cp_size=size)
        for source in range(size):
            keys = local_positions(LENGTH, cp_rank=source, cp_size=size)
            for block in blocks_of(deal, source, join=join):
                rows, columns = queries[block.queries], keys[block.keys]
                counted = torch.ones(len(rows), len(columns), dtype=torch.int64)
                if block.is_causal:
                    counted.tril_()
                if block.crosses_documents:
                    assert documents_BS is not None
                    counted *= documents_BS[0, rows][:, None] == documents_BS[0, columns]
                counts[rows[:, None], columns] += counted
    return counts


@pytest.mark.parametrize("join", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_score_that_counts_is_computed_once(
    size: int, causal: bool, join: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(context_blocks, "TILE_LENGTH", 5)
    ordered = torch.arange(LENGTH)[None] // 17
    scattered = torch.randint(3, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    for documents in (None, ordered, scattered):
        expected = torch.ones(LENGTH, LENGTH, dtype=torch.int64)
        if causal:
            expected.tril_()
        if documents is not None:
            expected *= documents[0][:, None] == documents[0]
        counts = times_computed(size, documents, causal=causal, join=join)
        assert torch.equal(counts, expected)


def test_tiles_of_other_documents_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_blocks, "TILE_LENGTH", 8)
    documents = torch.arange(LENGTH)[None] // 8
    deal = Deal(rank=0, size=1, softmax_scale=1.0, is_causal=True, document_ids_BS=documents)
    blocks = blocks_of(deal, 0, join=True)
    assert len(blocks) == LENGTH // 8
    assert all(block.is_causal and not block.crosses_documents for block in blocks)


def test_tiles_beyond_the_window_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context_blocks, "TILE_LENGTH", 8)
    deal = Deal(
        **{"rank": 0, "size": 1, "softmax_scale": 1.0, "is_causal": True},
        document_ids_BS=torch.zeros((1, LENGTH), dtype=torch.int64),
        window=9,
        seq_length=LENGTH,
    )
    blocks = blocks_of(deal, 0, join=False)
    # A tile sees itself, whole, and the one before, in part.
    assert len(blocks) == 2 * (LENGTH // 8) - 1
    assert all(block.crosses_window == (not block.is_causal) for block in blocks)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_causal_blocks_without_a_mask_are_equal_work(size: int) -> None:
    scores = []
    for rank in range(size):
        deal = Deal(rank=rank, size=size, softmax_scale=1.0, is_causal=True, document_ids_BS=None)
        blocks = [deal.block(source, length=LENGTH // size) for source in range(size)]
        assert [block.is_causal for block in blocks] == [source == rank for source in range(size)]
        scores.append(
            sum(
                (block.queries.stop - block.queries.start) * (block.keys.stop - block.keys.start)
                for block in blocks
            )
        )
    assert len(set(scores)) == 1
