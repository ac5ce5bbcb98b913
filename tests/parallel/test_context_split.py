from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

from megatron_curr.errors import RecipeError
from megatron_curr.parallel.context_split import (
    count_before,
    join_ranks,
    local_positions,
    split_sequence,
    unjoin_ranks,
)


@dataclass
class Group:
    cp_rank: int
    cp_size: int

    def rank(self) -> int:
        return self.cp_rank

    def size(self) -> int:
        return self.cp_size


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4])
def test_parts_join_to_the_whole(cp_size: int) -> None:
    whole = torch.arange(2 * 24).view(2, 24)
    parts = [split_sequence(whole, cp_rank=r, cp_size=cp_size, dim=1) for r in range(cp_size)]
    by_rank = torch.cat(parts, dim=1)
    assert torch.equal(join_ranks(by_rank, cp_size=cp_size, dim=1), whole)
    assert torch.equal(unjoin_ranks(whole, cp_size=cp_size, dim=1), by_rank)


@pytest.mark.parametrize("cp_size", [2, 3, 4])
def test_rotary_embeddings_are_dealt_the_same_way(cp_size: int) -> None:
    angles = torch.arange(24.0).view(24, 1, 1, 1)
    for cp_rank in range(cp_size):
        theirs = get_pos_emb_on_this_cp_rank(angles, 0, Group(cp_rank, cp_size))
        ours = local_positions(24, cp_rank=cp_rank, cp_size=cp_size)
        assert theirs.flatten().long().tolist() == ours.tolist()


def test_causal_work_is_equal_on_every_rank() -> None:
    work = [int((local_positions(64, cp_rank=r, cp_size=4) + 1).sum()) for r in range(4)]
    assert len(set(work)) == 1


def test_a_length_that_does_not_divide_names_one_that_does() -> None:
    with pytest.raises(RecipeError, match=r"seq_length=30 must be a multiple of .*8.*use 24"):
        split_sequence(torch.zeros(1, 30), cp_rank=0, cp_size=4, dim=1)


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_tokens_before_a_place_are_a_rank_s_first_ones(cp_size: int) -> None:
    for end in range(0, 25):
        for rank in range(cp_size):
            places = local_positions(24, cp_rank=rank, cp_size=cp_size)
            count = count_before(end, seq_length=24, cp_rank=rank, cp_size=cp_size)
            assert (places[:count] < end).all() and (places[count:] >= end).all()
