"""Models with experts train alike however experts, tensors, sequences and batches are split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_curr.models import experts, gpt
from tests.parallel.layouts import layout, run_steps, tiny_model
from tests.parallel.test_layouts import differences, layouts_equal_one_rank
from tests.ranks import run_ranks

EXPERTS = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 48}
# A loss as heavy as the other one, so that a wrong factor on it shows.
BALANCED = {"model": tiny_model(**EXPERTS, num_layers=2, moe_aux_loss_coeff=1.0)}
VARIANTS = {
    "balanced by a loss": BALANCED,
    "by a bias, shared expert, every other layer": {
        "model": tiny_model(
            **EXPERTS,
            num_layers=2,
            moe_layer_freq=2,
            moe_shared_expert_intermediate_size=32,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_bias_update_rate=0.05,
        ),
        "num_steps": 2,
    },
}
TWO_RANKS = {
    "ep2": layout(ep=2),
    "ep2 distributed optimizer": layout(ep=2, distributed_optimizer=True),
    "ep2 tp2 sp, experts whole": layout(ep=2, tp=2, etp=1, sequence_parallel=True),
    "tp2 sp": layout(tp=2, sequence_parallel=True),
    "tp2 sp, experts whole": layout(tp=2, etp=1, sequence_parallel=True),
    "ep2 cp2": layout(ep=2, cp=2),
    "dp2, two sequences in a micro-batch": layout(micro_batch_size=2),
}
FOUR_RANKS = {
    "ep2 tp2 sp": layout(ep=2, tp=2, sequence_parallel=True),
    "ep2 dp2 tp2 sp, experts whole, distributed optimizer": layout(
        ep=2, tp=2, etp=1, sequence_parallel=True, distributed_optimizer=True
    ),
    "ep2 pp2": layout(ep=2, pp=2),
}
RECOMPUTED = {
    "full": layout(ep=2, recompute="full"),
    "experts": layout(ep=2, recompute="selective", recompute_modules=["moe"]),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "one_rank.pt"
    run_ranks(save_one_rank, 1, path)
    return path


def save_one_rank(rank: int, path: Path) -> None:
    results = {name: run_steps(layout(), **variant) for name, variant in VARIANTS.items()}
    by_bias = results["by a bias, shared expert, every other layer"].expert_biases
    assert sorted(by_bias) == ["layer 1"]
    assert all(bias.any() for bias in by_bias.values())
    torch.save(results, path)


def test_two_ranks_equal_one(one_rank: Path) -> None:
    run_ranks(layouts_equal_one_rank, 2, one_rank, TWO_RANKS, VARIANTS)


def test_four_ranks_equal_one(one_rank: Path) -> None:
    run_ranks(layouts_equal_one_rank, 4, one_rank, FOUR_RANKS, VARIANTS)


def test_recomputed_tokens_are_counted_once(one_rank: Path) -> None:
    name = "by a bias, shared expert, every other layer"
    run_ranks(layouts_equal_one_rank, 2, one_rank, RECOMPUTED, {name: VARIANTS[name]})


def upstream_is_not_equal(rank: int, path: Path) -> None:
    one_rank = torch.load(path, weights_only=False)["balanced by a loss"]
    whole_experts = layout(tp=2, etp=1, sequence_parallel=True)

    gpt.mark_expert_parameters = lambda *args, **kwargs: None
    found = differences(run_steps(whole_experts, **BALANCED), one_rank)
    assert any("gradients of" in line and ".experts." in line for line in found), found

    experts.Router = TopKRouter
    for parallel in (layout(tp=2, sequence_parallel=True), layout(micro_batch_size=2)):
        found = differences(run_steps(parallel, **BALANCED), one_rank)
        assert any("gradients of" in line and "router" in line for line in found), found


def test_megatron_core_alone_depends_on_the_layout(one_rank: Path) -> None:
    """When this fails, upstream has mended itself and ``models/experts.py`` can shrink."""
    run_ranks(upstream_is_not_equal, 2, one_rank)
