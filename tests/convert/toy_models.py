"""Toy models of every family, made by transformers itself with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB_SIZE = 250  # padded where two tensor ranks share it: 250 is even, not a multiple of 4
NUM_TOKENS = 16
_PLAIN = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA_3_1 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
_DEEPSEEK = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 2,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
# Name to (model type of transformers, config).
TOYS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {**_PLAIN, "num_key_value_heads": 4}),
    "llama3_1": ("llama", {**_PLAIN, "rope_parameters": _LLAMA_3_1, "head_dim": 16}),
    "qwen2": ("qwen2", {**_PLAIN, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {**_PLAIN, "head_dim": 16}),
    "mistral": ("mistral", {**_PLAIN, "sliding_window": 5, "head_dim": 8}),
    "olmo2": ("olmo2", _PLAIN),
    "olmo3": (
        "olmo3",
        {
            **{**_PLAIN, "sliding_window": 5},
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    **{"rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0},
                    **{"original_max_position_embeddings": 8, "beta_fast": 32.0, "beta_slow": 1.0},
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "gemma": ("gemma", {**_PLAIN, "head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **{**_PLAIN, "head_dim": 16, "query_pre_attn_scalar": 20, "sliding_window": 5},
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
    ),
    "windows": (
        "qwen2",
        {**_PLAIN, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "phi3": (
        "phi3",
        {
            **{**_PLAIN, "pad_token_id": 0},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "internlm3": ("internlm3", {**_PLAIN, "head_dim": 16}),
    "falcon": (
        "falcon",
        {
            **{name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"},
            "num_kv_heads": 2,
            "ffn_hidden_size": 48,
            "new_decoder_architecture": True,
        },
    ),
    "falcon_7b": (
        "falcon",
        {
            **{name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"},
            "multi_query": True,
        },
    ),
    "cohere": ("cohere", {**_PLAIN, "logit_scale": 0.3, "pad_token_id": 0}),
    "cohere2": (
        "cohere2",
        {
            **{**_PLAIN, "logit_scale": 0.25, "pad_token_id": 0, "sliding_window": 5},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "granite": (
        "granite",
        {
            **{**_PLAIN, "embedding_multiplier": 6.0, "residual_multiplier": 0.3},
            **{"attention_multiplier": 0.2, "logits_scaling": 4.0, "tie_word_embeddings": True},
        },
    ),
    "smollm3": ("smollm3", {**_PLAIN, "no_rope_layer_interval": 2, "pad_token_id": 0}),
    "glm": ("glm", {**_PLAIN, "head_dim": 16, "pad_token_id": 0}),
    "glm4": ("glm4", {**_PLAIN, "head_dim": 16, "pad_token_id": 0}),
    "starcoder2": ("starcoder2", _PLAIN),
    "nemotron": ("nemotron", {**_PLAIN, "head_dim": 16}),
    "gpt_neox": (
        "gpt_neox",
        {
            **{name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"},
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gpt_neox_in_turn": (
        "gpt_neox",
        {
            **{name: value for name, value in _PLAIN.items() if name != "num_key_value_heads"},
            "use_parallel_residual": False,
        },
    ),
    "telechat2": ("llama", {**_PLAIN, "attention_bias": False}),
    "mixtral": ("mixtral", {**_PLAIN, "num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            **_PLAIN,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe_unnormed": (
        "qwen3_moe",
        {
            **_PLAIN,
            "head_dim": 8,
            "moe_intermediate_size": 24,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            **{**_PLAIN, "num_hidden_layers": 4, "head_dim": 16, "attention_bias": True},
            **{"use_qk_norm": True, "moe_intermediate_size": 24, "n_routed_experts": 8},
            **{"num_experts_per_tok": 4, "routed_scaling_factor": 1.5, "pad_token_id": 0},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **{**_DEEPSEEK, "q_lora_rank": None, "n_group": None, "topk_group": None},
            "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
        },
    ),
    "deepseek_v3": ("deepseek_v3", {**_DEEPSEEK, "rope_parameters": _YARN}),
    "deepseek_v3_plain_rope": ("deepseek_v3", _DEEPSEEK),
    # As Moonlight is: queries are not compressed, and the latent norm keeps an epsilon of its own.
    "moonlight": (
        "deepseek_v3",
        {
            **{**_DEEPSEEK, "q_lora_rank": None, "rms_norm_eps": 1e-2},
            **{"n_group": 1, "topk_group": 1, "n_shared_experts": 2},
        },
    ),
}
SPARSE = {
    *("mixtral", "qwen3_moe", "qwen3_moe_unnormed"),
    *("deepseek_v3", "deepseek_v3_plain_rope", "moonlight", "deepseek_v2", "glm4_moe"),
}


def toy_tokens() -> Tensor:
    """[B, S] ids."""
    return torch.randint(VOCAB_SIZE, (2, NUM_TOKENS), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def save_toy(name: str, folder: Path) -> Tensor:
    """Save a toy as its family publishes it; returns its logits [B, S, V] of ``toy_tokens``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, fields = TOYS[name]
    config = AutoConfig.for_model(kind, **fields)
    torch.manual_seed(len(name))
    model = AutoModelForCausalLM.from_config(config).eval()
    if name == "telechat2":
        add_biases(model)
    for parameter in model.state_dict().values():
        if parameter.dim() == 1:  # norms and biases begin as ones and zeros, which hide swaps
            parameter.add_(0.2 * torch.randn_like(parameter))
    logits = model(toy_tokens()).logits
    if name == "telechat2":
        save_as_telechat2(model, folder)
    else:
        model.save_pretrained(folder)
    return logits


def add_biases(model: nn.Module) -> None:
    """Make a Llama a TeleChat 2: attention and MLP write through linears with biases."""
    for layer in model.model.layers:
        for block, name in ((layer.self_attn, "o_proj"), (layer.mlp, "down_proj")):
            old = getattr(block, name)
            new = nn.Linear(old.in_features, old.out_features, bias=True)
            new.weight.copy_(old.weight)
            setattr(block, name, new)


def save_as_telechat2(model: nn.Module, folder: Path) -> None:
    """The same weights under TeleChat 2's names, with its fused keys and values."""
    from safetensors.torch import save_file

    config = model.config
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, new in (
            ("model.layers", "transformer.h"),
            ("model.embed_tokens", "transformer.word_embeddings"),
            ("model.norm", "transformer.ln_f"),
            ("self_attn.q_proj", "self_attention.query"),
            ("self_attn.o_proj", "self_attention.dense"),
            ("self_attn", "self_attention"),
        ):
            name = name.replace(old, new)
        tensors[name] = tensor.contiguous()
    for layer in range(config.num_hidden_layers):
        prefix = f"transformer.h.{layer}.self_attention"
        key, value = (
            tensors.pop(f"{prefix}.{letter}_proj.weight").unflatten(0, (-1, 8)) for letter in "kv"
        )
        tensors[f"{prefix}.key_value.weight"] = torch.cat([key, value], dim=1).flatten(0, 1)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["Telechat2ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "layer_norm_epsilon": config.rms_norm_eps,
        "seq_length": 64,
        "base_seqlen": 64,
        "training_seqlen": 64,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(fields))
