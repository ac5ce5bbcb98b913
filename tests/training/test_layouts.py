"""A whole run, two phases and evaluations, gives one rank's losses on every axis of two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import Runs, losses, newest_tensors, rows

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2_distributed_optimizer": {"parallel.use_distributed_optimizer": True},
    "tp2": {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True},
    "pp2": {"parallel.pipeline_model_parallel_size": 2},
    "pp2_interleaved": {
        "parallel.pipeline_model_parallel_size": 2,
        "parallel.virtual_pipeline_model_parallel_size": 2,
    },
    "cp2": {"parallel.context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def one_rank(runs: Runs) -> Path:
    return runs.train("one_rank")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_agree_with_one(runs: Runs, one_rank: Path, layout: str) -> None:
    run = runs.train(layout, ranks=2, changes=LAYOUTS[layout])
    assert losses(run) == pytest.approx(losses(one_rank), abs=1e-4)
    for name in ("train/grad_norm", "train/prose/loss_nats_per_token"):
        ours = [row[name] for row in rows(run, name)]
        assert ours == pytest.approx([row[name] for row in rows(one_rank, name)], abs=1e-3)
    name = "eval/code/loss_nats_per_token"
    ours = [row[name] for row in rows(run, name)]
    assert ours == pytest.approx([row[name] for row in rows(one_rank, name)], abs=1e-4)


def test_the_same_layout_twice_is_the_same_to_the_bit(runs: Runs, one_rank: Path) -> None:
    again = runs.train("again")
    assert rows(again) == rows(one_rank)
    assert newest_tensors(again) == newest_tensors(one_rank)


def test_evaluation_leaves_no_trace_in_the_weights(runs: Runs, one_rank: Path) -> None:
    changes = {"evaluation.every_tokens": 256}
    often = runs.train("evaluated_often", changes=changes)
    assert len(rows(often, "eval/prose/loss_nats_per_token")) > len(
        rows(one_rank, "eval/prose/loss_nats_per_token")
    )
    assert rows(often) == rows(one_rank)
    assert newest_tensors(often) == newest_tensors(one_rank)


def test_phases_change_inside_the_run(one_rank: Path) -> None:
    steps = rows(one_rank)
    assert [row["train/seq_length_tokens"] for row in steps] == [32] * 16 + [64] * 8
    assert [row["phase"] for row in steps] == ["short"] * 16 + ["mixed"] * 8
    assert [row["consumed_tokens"] for row in steps] == [
        *range(256, 4097, 256),
        *range(4608, 8193, 512),
    ]
    assert steps[15]["data/code/consumed_tokens"] == 0 < steps[-1]["data/code/consumed_tokens"]
    evaluations = rows(one_rank, "eval/prose/loss_nats_per_token")
    assert [row["consumed_tokens"] for row in evaluations] == [0, 2048, 4096, 6144, 8192]
    first, last = evaluations[0], evaluations[-1]
    assert last["eval/prose/loss_nats_per_token"] < first["eval/prose/loss_nats_per_token"] - 0.1
