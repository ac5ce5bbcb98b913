"""Communication that overlaps computation changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parallel.layouts import layout, run_steps, tiny_model
from tests.parallel.test_layouts import differences
from tests.ranks import run_ranks

REDUCE = {"overlap_grad_reduce": True}
BOTH = {**REDUCE, "overlap_param_gather": True, "distributed_optimizer": True}
BUCKET = 20_000  # weights: several buckets even here
VARIANTS = {
    "dense": {"num_steps": 3},
    "experts": {
        "model": tiny_model(num_layers=2, num_moe_experts=4, moe_ffn_hidden_size=48),
        "num_steps": 3,
    },
}
TWO_RANKS = {
    "dp2, reduce": (layout(**REDUCE), "dense"),
    "dp2, both": (layout(**BOTH), "dense"),
    "cp2, both": (layout(cp=2, **BOTH), "dense"),
    "ep2, both": (layout(ep=2, **BOTH), "experts"),
}
FOUR_RANKS = {
    "pp2 dp2, both": (layout(pp=2, **BOTH), "dense"),
    "pp2 vpp2 dp2, both": (layout(pp=2, vpp=2, **BOTH), "dense"),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overlap") / "one_rank.pt"
    run_ranks(save_one_rank, 1, path)
    return path


def save_one_rank(rank: int, path: Path) -> None:
    torch.save({name: run_steps(layout(), **variant) for name, variant in VARIANTS.items()}, path)


def overlap_changes_nothing(rank: int, path: Path, layouts: dict) -> None:
    one_rank = torch.load(path, weights_only=False)
    wrong = {}
    for name, (parallel, variant) in layouts.items():
        ours = run_steps(parallel, **VARIANTS[variant], bucket_size=BUCKET)
        if found := differences(ours, one_rank[variant]):
            wrong[name] = found
    assert not wrong, wrong


def test_two_ranks_equal_one(one_rank: Path) -> None:
    run_ranks(overlap_changes_nothing, 2, one_rank, TWO_RANKS)


def test_pipelines_equal_one_rank(one_rank: Path) -> None:
    run_ranks(overlap_changes_nothing, 4, one_rank, FOUR_RANKS)
