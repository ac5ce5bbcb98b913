from __future__ import annotations

import math

import pytest
import torch

from megatron_curr.models.backend import describe_backend
from megatron_curr.models.gpt import build_gpt, padded_vocab_size, transformer_config
from megatron_curr.parallel.groups import build_groups
from megatron_curr.plan.model_size import num_parameters
from megatron_curr.recipe.model import Model
from tests.parallel.layouts import SEQ_LENGTH, VOCAB_SIZE, layout, tiny_model
from tests.ranks import run_ranks

QWEN = {
    "qk_layernorm": True,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": False,
}


MIXTRAL = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 48,
    "moe_layer_freq": [0, 1, 1, 0],
    "moe_shared_expert_intermediate_size": 32,
}


def build_tiny(groups, *, seed: int = 1, vocab_size: int = VOCAB_SIZE, **changes):
    return build_gpt(
        tiny_model(**changes),
        parallel=layout(),
        precision="fp32",
        groups=groups,
        vocab_size=vocab_size,
        isolate_documents=True,
        seed=seed,
    )


def documents_do_not_see_each_other(rank: int) -> None:
    gpt = build_tiny(build_groups(layout()))
    tokens = torch.randint(VOCAB_SIZE, (2, SEQ_LENGTH), generator=torch.Generator().manual_seed(0))
    labels = tokens.roll(-1, dims=1)
    edge = 11
    documents = (torch.arange(SEQ_LENGTH) >= edge).long().expand(2, -1)
    with torch.no_grad():
        together = gpt(tokens, None, documents, labels=labels)
        packed = gpt(tokens, None, None, labels=labels)
        apart = [
            gpt(tokens[:, part], None, None, labels=labels[:, part])
            for part in (slice(None, edge), slice(edge, None))
        ]
    torch.testing.assert_close(together, torch.cat(apart, dim=1), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(packed[:, :edge], apart[0], rtol=2e-5, atol=2e-5)
    assert not torch.allclose(packed[:, edge:], apart[1], atol=1e-3)


def test_isolated_documents_equal_documents_alone() -> None:
    run_ranks(documents_do_not_see_each_other, 1)


def sizes_and_weights(rank: int) -> None:
    groups = build_groups(layout())
    for changes in ({}, QWEN, MIXTRAL):
        gpt = build_tiny(groups, **changes)
        held = sum(parameter.numel() for parameter in gpt.parameters())
        assert held == num_parameters(tiny_model(**changes), vocab_size=256)
    weights = dict(build_tiny(groups).named_parameters())
    std = 0.1
    embedding = weights["embedding.word_embeddings.weight"]
    assert embedding.std().item() == pytest.approx(std, rel=0.03)
    assert embedding.mean().item() == pytest.approx(0.0, abs=0.003)
    assert embedding.abs().max() > 3.5 * std
    narrow = weights["decoder.layers.1.mlp.linear_fc2.weight"].std().item()
    assert narrow == pytest.approx(std / math.sqrt(2 * 4), rel=0.05)
    assert torch.equal(weights["decoder.final_layernorm.weight"], torch.ones(64))

    experts = build_tiny(groups, **MIXTRAL).decoder.layers[1].mlp.experts.local_experts
    first, second = (expert.linear_fc2.weight for expert in experts[:2])
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(std / math.sqrt(2 * 4), rel=0.05)

    again, other = dict(build_tiny(groups).named_parameters()), build_tiny(groups, seed=2)
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())
    assert not torch.equal(other.embedding.word_embeddings.weight, embedding)
    assert not torch.equal(
        weights["decoder.layers.0.mlp.linear_fc1.weight"],
        weights["decoder.layers.1.mlp.linear_fc1.weight"],
    )
    larger = build_tiny(groups, vocab_size=300).embedding.word_embeddings.weight
    assert larger.shape[0] == 384 and torch.equal(larger[:256], embedding)


def test_sizes_and_first_weights() -> None:
    run_ranks(sizes_and_weights, 1)


@pytest.mark.parametrize(
    ("tp_size", "rows"), [(1, 8064), (2, 8064), (8, 8064), (3, 8064), (5, 8320)]
)
def test_vocabulary_rows_do_not_depend_on_common_layouts(tp_size: int, rows: int) -> None:
    model = tiny_model(make_vocab_size_divisible_by=128)
    assert padded_vocab_size(8000, model, tp_size=tp_size) == rows
    assert rows % tp_size == 0


def test_loss_is_summed_per_token_before_any_wrapper_is_built() -> None:
    config = transformer_config(tiny_model(), parallel=layout(), precision="bf16")
    assert config.calculate_per_token_loss
    assert config.params_dtype is config.pipeline_dtype is torch.bfloat16


def test_settings_of_experts_reach_megatron_core() -> None:
    mixtral = Model.model_validate({"preset": "mixtral_8x7b"})
    config = transformer_config(mixtral, parallel=layout(ep=2), precision="bf16")
    assert (config.num_moe_experts, config.moe_router_topk) == (8, 2)
    assert config.moe_router_load_balancing_type == "seq_aux_loss"
    assert (config.moe_aux_loss_coeff, config.moe_router_dtype) == (0.02, "fp32")
    assert config.moe_layer_freq == [1] * 32
    assert (config.expert_model_parallel_size, config.moe_token_dispatcher_type) == (2, "alltoall")
    dense = transformer_config(tiny_model(), parallel=layout(), precision="fp32")
    assert dense.num_moe_experts is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_modules_chosen_on_a_cpu() -> None:
    chosen = describe_backend()
    assert chosen["norm"] == "megatron_curr.models.norms.RMSNorm"
    assert chosen["core_attention"] == "megatron_curr.models.attention.CoreAttention"
    assert not {"norm_and_linear", "experts"} & set(chosen)
    experts = describe_backend(has_experts=True)["experts"]
    assert experts == "megatron.core.transformer.moe.experts.SequentialMLP"
