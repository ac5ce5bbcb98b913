"""Command R and R7B: ``CohereForCausalLM``, ``Cohere2ForCausalLM``; no norms of queries and keys.

Attention and MLP read one norm of the layer's input, a LayerNorm without a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import ATTENTION, FIXED, HEAD, INPUT_NORM, MLP, NAMES, TAIL
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.convert.windows import (
    FULL,
    WINDOW_SETTINGS,
    WINDOWS,
    read_windows,
    write_windows,
)
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.model import Model


def _write(model: Model) -> dict[str, Any]:
    return {**plain_heads(model), "logit_scale": 1 / model.logits_scaling}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"logits_scaling": 1 / config["logit_scale"]}


FAMILY = Family(
    architecture="CohereForCausalLM",
    model_type="cohere",
    head=HEAD,
    layer=(INPUT_NORM, *ATTENTION, *MLP),
    tail=TAIL,
    names={
        **{name: ours for name, ours in NAMES.items() if ours != "layernorm_epsilon"},
        "layer_norm_eps": "layernorm_epsilon",
    },
    fixed={**FIXED, "attention_bias": (False,), "use_qk_norm": (False,)},
    requires={
        "normalization": "LayerNorm",
        "layernorm_bias": False,
        "parallel_residual": True,
        "shared_residual_norm": True,
        "rotary_interleaved": True,
    },
    computed=frozenset({"logits_scaling"}),
    reads=frozenset({"logit_scale"}),
    stretched=frozenset({"linear", "llama3"}),  # YaRN is not for rotations of neighbours
    read=_read,
    write=_write,
)


def _write_2(model: Model) -> dict[str, Any]:
    if model.unrotated_layers != tuple(not windowed for windowed in model.windowed_layers):
        raise RecipeError("no_rope_freq is not that of the layers without a window, there it is")
    return {**_write(model), **write_windows(model)}


def _read_2(config: Mapping[str, Any]) -> dict[str, Any]:
    whole = [int(layer == FULL) for layer in config["layer_types"]]
    # The class goes by its layers' windows, however long they are.
    window = {"window_size": config["sliding_window"]}
    window["window_attn_skip_freq"] = [1 - layer for layer in whole]
    return {**_read(config), **read_windows(config), **window, "no_rope_freq": whole}


COHERE2 = replace(
    FAMILY,
    architecture="Cohere2ForCausalLM",
    model_type="cohere2",
    fixed={**FIXED, "attention_bias": (False,)},
    computed=WINDOW_SETTINGS | {"logits_scaling", "no_rope_freq"},
    reads=WINDOWS | {"logit_scale"},
    read=_read_2,
    write=_write_2,
)
"""Command R7B and A: layers with a window rotate, the others do not."""
