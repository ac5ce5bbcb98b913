from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks


def add_up(rank: int, expected: int) -> None:
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert total == expected
    assert torch.get_num_threads() == 1


def fail_on_rank_one(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank one's own story")
    dist.barrier()


def die_on_rank_one(rank: int) -> None:
    if rank == 1:
        os._exit(7)
    time.sleep(60)


def hang(rank: int) -> None:
    time.sleep(60)


def test_ranks_meet() -> None:
    run_ranks(add_up, 2, 3)


def test_the_first_failure_is_told_and_not_its_echo() -> None:
    with pytest.raises(RankError, match=r"rank 1:\n(?s:.*)rank one's own story"):
        run_ranks(fail_on_rank_one, 2)


def test_a_rank_that_dies_without_a_word_ends_the_others() -> None:
    with pytest.raises(RankError, match=r"exit codes .*7"):
        run_ranks(die_on_rank_one, 2)


def test_a_hang_is_killed_and_shows_where_it_hung() -> None:
    with pytest.raises(RankError, match=r"still ran after 4 s(?s:.*)in hang"):
        run_ranks(hang, 1, timeout_s=4.0)
