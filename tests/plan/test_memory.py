"""The memory model against what the modules themselves allocate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_curr.plan.activations import MicroBatch, embedding_bytes, layer_bytes
from megatron_curr.plan.dit import END_TOKENS
from megatron_curr.plan.layout import axes_of, pipeline_stages
from megatron_curr.plan.memory import (
    activation_bytes,
    chunks_in_flight,
    held_weights,
    optimizer_bytes,
)
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from tests.models.videos import tiny_dit
from tests.parallel.layouts import layout, tiny_model
from tests.plan.allocations import NUM_SAMPLES, Setting, allocated

WITHIN = 0.05

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 4,  # every rank's experts see every row: no balance to chance
    "moe_ffn_hidden_size": 48,
    "moe_aux_loss_coeff": 0.01,
    "moe_shared_expert_intermediate_size": 32,
}
QWEN = {
    "qk_layernorm": True,
    "add_qkv_bias": True,
    "untie_embeddings_and_output_weights": False,
}


NEOX = {
    "normalization": "LayerNorm",
    "activation": "gelu",
    "linear_biases": "all",
    "parallel_residual": True,
    "rotary_percent": 0.25,
}
OLMO = {"norm_position": "after", "qk_layernorm": True, "qk_layernorm_over": "projection"}
LATENT = {
    "num_query_groups": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 24,  # as wide as queries: else the CPU's kernel is not fused, and keeps scores
}


def setting(
    *,
    rank: int = 0,
    world_size: int = 1,
    precision: str = "bf16",
    isolate_documents: bool = False,
    keeps_average: bool = False,
    model: dict[str, Any] | None = None,
    **parallel: Any,
) -> Setting:
    given = Setting(
        model=tiny_model(**{"num_layers": 2, **(model or {})}),
        keeps_average=keeps_average,
        parallel=layout(**parallel),
        rank=rank,
        world_size=world_size,
        precision=precision,
        isolate_documents=isolate_documents,
    )
    tokens = {"micro_batch_tokens": NUM_SAMPLES * given.seq_length}
    return replace(given, parallel=given.parallel.model_copy(update=tokens))


def micro_batch(given: Setting, *, is_fused: bool = False) -> MicroBatch:
    return MicroBatch(
        model=given.model,
        parallel=given.parallel,
        vocab_size=given.vocab_size,
        keeps_average=given.keeps_average,
        num_samples=given.parallel.micro_batch_tokens // given.seq_length,
        seq_length=given.seq_length,
        precision=given.precision,
        is_fused=is_fused,
        isolate_documents=given.isolate_documents,
    )


SAVED = {
    "dense": setting(),
    "fp32": setting(precision="fp32"),
    "tied, norms of queries": setting(model=QWEN),
    "tensor": setting(tp=2, world_size=2),
    "sequence": setting(tp=2, sequence_parallel=True, world_size=2),
    "tensor 4, sequence": setting(
        tp=4, sequence_parallel=True, world_size=4, model={"num_query_groups": 4}
    ),
    "ring": setting(cp=2, world_size=2),
    "gather": setting(cp=2, world_size=2, context_parallel_exchange="all_gather"),
    "heads": setting(cp=2, world_size=2, context_parallel_exchange="a2a"),
    "documents": setting(isolate_documents=True),
    "window": setting(model={"window_size": 9}),
    "norms on both sides": setting(model={"norm_position": "both"}),
    "one norm for both": setting(
        model={"parallel_residual": True, "shared_residual_norm": True},
    ),
    "sequence and ring": setting(tp=2, cp=2, sequence_parallel=True, world_size=4),
    "experts": setting(model=EXPERTS),
    "experts shared out": setting(model=EXPERTS, ep=2, world_size=2),
    "experts cut": setting(model=EXPERTS, tp=2, sequence_parallel=True, world_size=2),
    "experts, not cut": setting(
        model=EXPERTS, tp=2, ep=2, etp=1, sequence_parallel=True, world_size=2
    ),
    "gelu, biases, parallel": setting(model=NEOX),
    "norms after": setting(model=OLMO),
    "latent": setting(model=LATENT),
    "latent, sequence": setting(model=LATENT, tp=2, sequence_parallel=True, world_size=2),
    "recompute attention": setting(recompute="selective"),
    "recompute mlp": setting(recompute="selective", recompute_modules=["mlp"]),
    "recompute experts": setting(model=EXPERTS, recompute="selective", recompute_modules=["moe"]),
    "recompute shared experts": setting(
        model=EXPERTS, recompute="selective", recompute_modules=["shared_experts"]
    ),
    "recompute layers": setting(recompute="full"),
    "recompute pairs": setting(recompute="full", recompute_num_layers=2, model={"num_layers": 4}),
    "recompute some": setting(
        recompute="full",
        recompute_num_layers=2,
        recompute_method="block",
        model={"num_layers": 4},
    ),
    "first stage": setting(pp=2, world_size=2, rank=0),
    "last stage": setting(pp=2, world_size=2, rank=1),
    "uneven last stage": setting(
        pp=2, world_size=2, rank=1, model={"num_layers": 4}, num_layers_in_last_pipeline_stage=1
    ),
}


@pytest.mark.parametrize("name", SAVED)
def test_activations_are_those_that_autograd_saves(name: str) -> None:
    given = SAVED[name]
    stage = pipeline_stages(given.model.num_layers, given.parallel)[given.rank % _stages(given)]
    counted = activation_bytes(micro_batch(given), stage, num_micro_batches=1)
    assert counted == pytest.approx(allocated(given).saved[0], rel=WITHIN)


VIDEOS = {
    "dense": layout(),
    "sequence": layout(tp=2, sequence_parallel=True),
    "ring": layout(cp=2),
    "recompute mlp": layout(recompute="selective", recompute_modules=["mlp"]),
    "recompute layers": layout(recompute="full"),
}


def video_setting(parallel: Parallel) -> Setting:
    wide = {"hidden_size": 144, "ffn_hidden_size": 576, "num_layers": 3}
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    model = tiny_dit(**wide)
    given = Setting(model, parallel, world_size=ranks, vocab_size=0)
    tokens = model.num_patches(given.latent_shape) + END_TOKENS
    held = parallel.model_copy(update={"micro_batch_tokens": NUM_SAMPLES * tokens})
    return replace(given, parallel=held, seq_length=tokens)


@pytest.mark.parametrize("name", VIDEOS)
def test_activations_of_video_are_those_that_autograd_saves(name: str) -> None:
    given = video_setting(VIDEOS[name])
    (stage,) = pipeline_stages(given.model.num_layers, given.parallel)
    counted = activation_bytes(micro_batch(given), stage, num_micro_batches=1)
    assert counted == pytest.approx(allocated(given).saved[0], rel=WITHIN)


def test_states_of_video_are_those_that_are_allocated() -> None:
    given = video_setting(layout(distributed_optimizer=True, cp=2))
    batch, axes = micro_batch(given), axes_of(given.parallel, given.world_size)
    (stage,) = pipeline_stages(given.model.num_layers, given.parallel)
    held, found = held_weights(batch, stage), allocated(given, with_optimizer=True)
    assert held.total * batch.element_bytes == pytest.approx(found.parameters, rel=WITHIN)
    counted = optimizer_bytes(batch, held, axes=axes)
    assert counted == pytest.approx(found.optimizer, rel=WITHIN)


def test_activations_of_interleaved_stages_are_counted_by_chunk() -> None:
    given = setting(pp=2, vpp=2, world_size=2, rank=0, model={"num_layers": 4})
    batch = micro_batch(given)
    layer = layer_bytes(batch, has_experts=False)
    first, second = allocated(given).saved
    assert first == pytest.approx(layer + embedding_bytes(batch), rel=WITHIN)
    assert second == pytest.approx(layer, rel=WITHIN)


STATES = {
    "dense": setting(),
    "moving average": setting(keeps_average=True),
    "fp32": setting(precision="fp32"),
    "distributed optimizer": setting(distributed_optimizer=True, world_size=4),
    "distributed optimizer, fp32": setting(
        precision="fp32", distributed_optimizer=True, world_size=4
    ),
    "tensor": setting(tp=2, world_size=2),
    "first stage": setting(pp=2, world_size=2, rank=0),
    "last stage, tied": setting(pp=2, world_size=2, rank=1, model=QWEN),
    "context ranks share the optimizer": setting(cp=2, distributed_optimizer=True, world_size=4),
    "experts": setting(model=EXPERTS),
    "experts shared out": setting(model=EXPERTS, ep=2, distributed_optimizer=True, world_size=4),
    "experts, not cut": setting(
        model=EXPERTS,
        tp=2,
        ep=2,
        etp=1,
        sequence_parallel=True,
        distributed_optimizer=True,
        world_size=4,
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_are_those_that_are_allocated(name: str) -> None:
    given = STATES[name]
    batch, axes = micro_batch(given), axes_of(given.parallel, given.world_size)
    stage = pipeline_stages(given.model.num_layers, given.parallel)[given.rank % _stages(given)]
    held = held_weights(batch, stage)
    found = allocated(given, with_optimizer=True)
    assert held.total * batch.element_bytes == pytest.approx(found.parameters, rel=WITHIN)
    assert held.total * 4 == pytest.approx(found.gradients, rel=WITHIN)
    counted = optimizer_bytes(batch, held, axes=axes)
    assert counted == pytest.approx(found.optimizer, rel=WITHIN)


def _stages(given: Setting) -> int:
    return given.parallel.pipeline_model_parallel_size


def test_transformer_engine_keeps_what_the_formula_says() -> None:
    model = Model.model_validate({"preset": "llama3_70b"})
    given = Setting(model, layout(tp=8, sequence_parallel=True), seq_length=8192)
    tokens = given.parallel.model_copy(update={"micro_batch_tokens": 8192})
    batch = micro_batch(Setting(model, tokens, seq_length=8192), is_fused=True)
    widths = 4 * 8192 + 3 * 8192 + 3 * 1024 + 3 * 28672
    log_sums = 4 * 8192 * 64 // 8
    assert layer_bytes(batch, has_experts=False) == pytest.approx(
        2 * 8192 // 8 * widths + log_sums, rel=1e-3
    )


def test_micro_batches_in_flight_follow_the_schedules() -> None:
    plain = pipeline_stages(32, layout(pp=4))
    assert [chunks_in_flight(stage, 16) for stage in plain] == [4, 3, 2, 1]
    assert [chunks_in_flight(stage, 2) for stage in plain] == [2, 2, 2, 1]
    interleaved = pipeline_stages(32, layout(pp=4, vpp=2))
    assert [chunks_in_flight(stage, 16) for stage in interleaved] == [11, 9, 7, 5]
