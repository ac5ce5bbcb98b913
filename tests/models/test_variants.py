"""Every variant of a layer that a published family needs trains alike on every layout."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.parallel.layouts import layout, run_steps, tiny_model
from tests.parallel.test_layouts import layouts_equal_one_rank
from tests.ranks import run_ranks

VARIANTS = {
    "gpt_neox": {
        "num_query_groups": 4,
        "normalization": "LayerNorm",
        "activation": "gelu",
        "linear_biases": "all",
        "parallel_residual": True,
        "rotary_percent": 0.5,
    },
    "olmo2": {
        "norm_position": "after",
        "qk_layernorm": True,
        "qk_layernorm_over": "projection",
    },
    "yarn": {
        "yarn_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 32,
        "yarn_mscale": 1.5,
    },
    "granite": {
        "embedding_multiplier": 6.0,
        "residual_multiplier": 0.3,
        "softmax_scale": 0.2,
        "logits_scaling": 4.0,
        "untie_embeddings_and_output_weights": False,
    },
    "glm4": {  # which layers rotate is SmolLM 3's
        "norm_position": "both",
        "rotary_interleaved": True,
        "rotary_percent": 0.5,
        "no_rope_freq": 2,
    },
    "gemma3": {
        "window_size": 9,
        "window_attn_skip_freq": 3,
        "window_rotary_base": 100.0,
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
        "yarn_scaling_factor": 4.0,
        "yarn_original_max_position_embeddings": 32,
        "activation": "geglu_tanh",
    },
    "cohere": {
        "normalization": "LayerNorm",
        "layernorm_bias": False,
        "parallel_residual": True,
        "shared_residual_norm": True,
    },
    "nemotron": {
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu",
    },
    "moonlight": {
        "num_query_groups": 4,
        "kv_lora_rank": 16,
        "qk_head_dim": 12,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 10,
        "latent_layernorm_epsilon": 1e-2,
    },
    "telechat2": {"linear_biases": "into_residual", "rope_scaling_factor": 8.0},
    "deepseek_v3": {
        "num_query_groups": 4,
        "kv_lora_rank": 16,
        "q_lora_rank": 24,
        "qk_head_dim": 12,
        "qk_pos_emb_head_dim": 8,
        "v_head_dim": 10,
        "yarn_scaling_factor": 40.0,
        "yarn_mscale_all_dim": 1.0,
        "num_moe_experts": 8,
        "moe_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 32,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_topk": 4,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_aux_loss_coeff": 0.01,
    },
}
MODELS = {name: {"model": tiny_model(**settings)} for name, settings in VARIANTS.items()}
ONE_RANK_EACH = {"tp2 sp": layout(tp=2, sequence_parallel=True, etp=1), "cp2": layout(cp=2)}
# Without experts and latent attention tensor parallelism needs no sequence parallelism.
DENSE = {name: MODELS[name] for name, model in VARIANTS.items() if "kv_lora_rank" not in model}


def save_one_rank(rank: int, path: Path) -> None:
    torch.save({name: run_steps(layout(), **variant) for name, variant in MODELS.items()}, path)


def two_ranks(rank: int, path: Path) -> None:
    layouts_equal_one_rank(rank, path, ONE_RANK_EACH, MODELS)
    layouts_equal_one_rank(rank, path, {"tp2": layout(tp=2), "pp2": layout(pp=2)}, DENSE)


def test_variants_of_published_families_train_alike_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(save_one_rank, 1, tmp_path / "one.pt")
    run_ranks(two_ranks, 2, tmp_path / "one.pt")
