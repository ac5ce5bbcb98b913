"""A model whose context ranks exchange in any way trains as one rank does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_curr.models.gpt import transformer_config
from tests.parallel.layouts import layout, run_steps, tiny_model
from tests.parallel.test_layouts import differences
from tests.ranks import run_ranks

# Heads for an all-to-all over four ranks, and two key/value heads for one over two of the four.
VARIANTS = {
    "eight heads": {"model": tiny_model(num_layers=2, num_attention_heads=8, num_query_groups=4)},
    "isolated documents": {
        "model": tiny_model(num_layers=2, num_attention_heads=8, num_query_groups=4),
        "isolate_documents": True,
    },
}
FEWER_HEADS_THAN_RANKS = {"four heads": {"model": tiny_model(num_layers=2)}}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context") / "one_rank.pt"
    run_ranks(save_one_rank, 1, path)
    return path


def save_one_rank(rank: int, path: Path) -> None:
    every = {**VARIANTS, **FEWER_HEADS_THAN_RANKS}
    torch.save({name: run_steps(layout(), **variant) for name, variant in every.items()}, path)


def exchanges_equal_one_rank(rank: int, path: Path, layouts: dict, variants: dict) -> None:
    one_rank = torch.load(path, weights_only=False)
    wrong = {}
    for kind, parallel in layouts.items():
        for name, variant in variants.items():
            if found := differences(run_steps(parallel, **variant), one_rank[name]):
                wrong[f"{kind}, {name}"] = found
    assert not wrong, wrong


def test_two_context_ranks_equal_one(one_rank: Path) -> None:
    kinds = ("p2p", "all_gather", "a2a")
    layouts = {kind: layout(cp=2, context_parallel_exchange=kind) for kind in kinds}
    layouts["p2p, recompute"] = layout(cp=2, recompute="full")
    run_ranks(exchanges_equal_one_rank, 2, one_rank, layouts, VARIANTS)


def test_four_context_ranks_equal_one(one_rank: Path) -> None:
    kinds = ("p2p", "all_gather", "a2a", "a2a+p2p")
    layouts = {kind: layout(cp=4, context_parallel_exchange=kind) for kind in kinds}
    documents = {name: VARIANTS[name] for name in ("isolated documents",)}
    run_ranks(exchanges_equal_one_rank, 4, one_rank, layouts, documents)


def test_more_context_ranks_than_key_value_heads_equal_one(one_rank: Path) -> None:
    layouts = {"a2a+p2p": layout(cp=4, context_parallel_exchange="a2a+p2p")}
    run_ranks(exchanges_equal_one_rank, 4, one_rank, layouts, FEWER_HEADS_THAN_RANKS)


def test_exchange_reaches_every_core_through_the_configuration() -> None:
    parallel = layout(cp=4, context_parallel_exchange="a2a+p2p")
    config = transformer_config(tiny_model(), parallel=parallel, precision="fp32")
    assert config.cp_comm_type == "a2a+p2p"
    assert config.hierarchical_context_parallel_sizes == [2, 2]
