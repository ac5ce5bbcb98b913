"""A slow rank is measured and named."""

from __future__ import annotations

import time
from pathlib import Path

from tests.ranks import run_ranks
from tests.training.runs import Runs, rank_log, rows, train_rank, within_step


def train_with_a_slow_one(rank: int, recipe: str) -> None:
    from megatron_curr.training import stragglers

    stragglers.EVERY_STEPS = 8  # the run is short
    if rank == 1:
        within_step(7, lambda: time.sleep(0.3))
    train_rank(rank, recipe, 2, 4096)


def test_a_slow_rank_is_named(runs: Runs) -> None:
    run_ranks(train_with_a_slow_one, 2, str(runs.recipe("slow")))
    run: Path = runs.folder / "slow"
    measured = rows(run, "perf/slowest_rank_ratio")
    assert [row["step"] for row in measured] == [8, 16]
    log = rank_log(run).read_text()
    assert "slow ranks hold up the others" in log
    assert "rank 1 on" in log.split("slow ranks hold up the others")[1].splitlines()[0]
