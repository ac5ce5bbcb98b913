"""Layouts that the matrix of tests/training/test_parity.py has no room for equal one rank.

Loss, gradient norm and every gradient of one step of the model alone, without a run around it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_curr.models.gpt import transformer_config
from megatron_curr.training import parity
from tests.parallel.layouts import Result, layout, run_steps, tiny_model
from tests.ranks import run_ranks

TOLERANCE = 2e-5

VARIANTS = {
    "llama": {},
    "isolated documents": {"isolate_documents": True},
    "qwen, tied": {
        "model": tiny_model(
            qk_layernorm=True, add_qkv_bias=True, untie_embeddings_and_output_weights=False
        )
    },
}
TIED = {"qwen, tied": VARIANTS["qwen, tied"]}
SIX_LAYERS = {
    "six layers, tied": {
        "model": tiny_model(num_layers=6, untie_embeddings_and_output_weights=False)
    }
}
ONE_QUERY_GROUP = {"one query group": {"model": tiny_model(num_query_groups=1)}}

DEEP_PIPELINES = {
    "pp4": layout(pp=4),
    "pp4, two layers in the first stage, two in the last": layout(
        pp=4, num_layers_in_first_pipeline_stage=2, num_layers_in_last_pipeline_stage=2
    ),
    "pp2 vpp2 dp2, four layers in the last stage": layout(
        pp=2, vpp=2, num_layers_in_last_pipeline_stage=4, distributed_optimizer=True
    ),
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("layouts") / "one_rank.pt"
    run_ranks(save_one_rank, 1, path)
    return path


def save_one_rank(rank: int, path: Path) -> None:
    results = {
        name: run_steps(layout(), **variant)
        for name, variant in {**VARIANTS, **SIX_LAYERS, **ONE_QUERY_GROUP}.items()
    }
    results["llama bf16"] = run_steps(layout(), precision="bf16", num_steps=2)
    torch.save(results, path)


def differences(ours: Result, one_rank: Result) -> list[str]:
    """What differs by more than the tolerance, largest relative difference of each first."""
    found = []
    if ours.first_weights.keys() != one_rank.first_weights.keys():
        found.append(f"parameters {ours.first_weights.keys() ^ one_rank.first_weights.keys()}")
    for name, weight in one_rank.first_weights.items():
        if not torch.equal(weight, ours.first_weights[name]):
            found.append(f"first weight {name}")
    if abs(ours.loss / one_rank.loss - 1) > TOLERANCE:
        found.append(f"loss {ours.loss} for {one_rank.loss}")
    if abs(ours.grad_norm / one_rank.grad_norm - 1) > TOLERANCE:
        found.append(f"gradient norm {ours.grad_norm} for {one_rank.grad_norm}")
    pairs = {
        parity.GRADIENTS: (ours.gradients, one_rank.gradients),
        parity.WEIGHTS: (ours.weights, one_rank.weights),
    }
    for quantity, (mine, theirs) in pairs.items():
        for difference in parity.differences(quantity, mine, theirs):
            if not difference.relative <= TOLERANCE:
                found.append(str(difference))
    found += [f"replicas of {name}" for name in ours.unequal_replicas]
    for name, bias in one_rank.expert_biases.items():
        if not torch.equal(bias, ours.expert_biases[name]):
            found.append(f"expert bias of {name}")
    return found


def layouts_equal_one_rank(rank: int, path: Path, layouts: dict, variants: dict[str, dict]) -> None:
    one_rank = torch.load(path, weights_only=False)
    wrong = {}
    for layout_name, parallel in layouts.items():
        for variant_name, variant in variants.items():
            ours = run_steps(parallel, **variant)
            if found := differences(ours, one_rank[variant_name]):
                wrong[f"{layout_name}, {variant_name}"] = found
    assert not wrong, wrong


def test_more_tensor_ranks_than_query_groups(one_rank: Path) -> None:
    layouts = {"tp2": layout(tp=2), "tp2 sp": layout(tp=2, sequence_parallel=True)}
    run_ranks(layouts_equal_one_rank, 2, one_rank, layouts, ONE_QUERY_GROUP)


def test_deep_and_uneven_pipelines_equal_one_rank(one_rank: Path) -> None:
    even = {"pp4": DEEP_PIPELINES["pp4"]}
    run_ranks(layouts_equal_one_rank, 4, one_rank, even, TIED)
    uneven = {name: parallel for name, parallel in DEEP_PIPELINES.items() if name != "pp4"}
    run_ranks(layouts_equal_one_rank, 4, one_rank, uneven, SIX_LAYERS)


def test_recomputed_activations_change_nothing(one_rank: Path) -> None:
    layouts = {
        "full": layout(tp=2, sequence_parallel=True, recompute="full"),
        "full, units of two layers": layout(
            tp=2, sequence_parallel=True, recompute="full", recompute_num_layers=2
        ),
        "full, one layer of each stage": layout(
            pp=2, recompute="full", recompute_method="block", recompute_num_layers=1
        ),
        "attention and mlp": layout(
            tp=2,
            sequence_parallel=True,
            recompute="selective",
            recompute_modules=["core_attn", "mlp"],
        ),
        "selective": layout(tp=2, sequence_parallel=True, recompute="selective"),
        "selective cp2": layout(cp=2, recompute="selective"),
    }
    variants = {name: VARIANTS[name] for name in ("isolated documents",)}
    run_ranks(layouts_equal_one_rank, 2, one_rank, layouts, variants)


def bf16_agrees(rank: int, path: Path) -> None:
    one_rank = torch.load(path, weights_only=False)["llama bf16"]
    layouts = {
        "tp2 sp": layout(tp=2, sequence_parallel=True),
        "dp2": layout(distributed_optimizer=True),
    }
    for name, parallel in layouts.items():
        ours = run_steps(parallel, precision="bf16", num_steps=2)
        assert ours.weights["output_layer.weight"].dtype is torch.bfloat16
        assert abs(ours.loss / one_rank.loss - 1) < 1e-3, name
        assert abs(ours.grad_norm / one_rank.grad_norm - 1) < 2e-2, name
        assert not ours.unequal_replicas, name


def test_bf16_agrees_to_its_precision(one_rank: Path) -> None:
    run_ranks(bf16_agrees, 2, one_rank)


def test_exchange_reaches_every_core_through_the_configuration() -> None:
    parallel = layout(cp=4, context_parallel_exchange="a2a+p2p")
    config = transformer_config(tiny_model(), parallel=parallel, precision="fp32")
    assert config.cp_comm_type == "a2a+p2p"
    assert config.hierarchical_context_parallel_sizes == [2, 2]
