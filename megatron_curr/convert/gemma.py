"""Gemma: ``GemmaForCausalLM``, and Gemma 3's text: ``Gemma3ForCausalLM``.

Embeddings are scaled by the root of the hidden size, norms are around 1, and gates are GELUs. In
bf16 the published code rounds that root to bf16; here it stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_curr.convert.family import Family, all_rows, hidden
from megatron_curr.convert.llama import (
    ATTENTION,
    HEAD,
    INPUT_NORM,
    LAYER,
    MLP,
    NAMES,
    TAIL,
    layer_entry,
)
from megatron_curr.convert.qwen3 import QUERY_KEY_NORMS
from megatron_curr.convert.windows import (
    WINDOW_SETTINGS,
    WINDOWS,
    read_windows,
    write_windows,
)
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.model import Model

_AROUND_1 = {"layernorm_zero_centered_gamma": True, "activation": "geglu_tanh"}


def _scaled(model: Model) -> dict[str, Any]:
    root = math.sqrt(model.hidden_size)
    if not math.isclose(model.embedding_multiplier, root, rel_tol=1e-12):
        raise RecipeError(f"embedding_multiplier is {model.embedding_multiplier}, there {root}")
    return {}


def _read_scale(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"embedding_multiplier": math.sqrt(config["hidden_size"])}


def _write_gemma3(model: Model) -> dict[str, Any]:
    scale = model.softmax_scale or 1 / math.sqrt(model.kv_channels)
    fields = {**_scaled(model), **write_windows(model), "query_pre_attn_scalar": scale**-2}
    if math.isclose(scale**-2, whole := round(scale**-2), rel_tol=1e-12):
        fields["query_pre_attn_scalar"] = whole
    else:
        raise RecipeError(f"softmax_scale is {scale}, there one over the root of a whole number")
    if model.window_rotary_base is not None:
        fields["rope_local_base_freq"] = model.window_rotary_base  # of version 4 of transformers
    return fields


def _read_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    scalar, width = config["query_pre_attn_scalar"], config["head_dim"]
    scale = None if scalar == width else 1 / math.sqrt(scalar)
    return {**_read_scale(config), **read_windows(config), "softmax_scale": scale}


GEMMA = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    head=HEAD,
    layer=LAYER,
    tail=TAIL,
    names=NAMES,
    fixed={
        "hidden_act": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (None, False),
    },
    requires=_AROUND_1,
    computed=frozenset({"embedding_multiplier"}),
    read=_read_scale,
    write=_scaled,
)
GEMMA3 = replace(
    GEMMA,
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    layer=(
        INPUT_NORM,
        *ATTENTION,
        *QUERY_KEY_NORMS,
        layer_entry(
            "post_attention_layernorm.weight",
            "self_attention.linear_proj.post_norm.weight",
            all_rows(hidden),
        ),
        layer_entry(
            "pre_feedforward_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight",
            all_rows(hidden),
        ),
        *MLP,
        layer_entry(
            "post_feedforward_layernorm.weight",
            "mlp.linear_fc2.post_norm.weight",
            all_rows(hidden),
        ),
    ),
    fixed={
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attention_bias": (False,),
        "use_bidirectional_attention": (False, None),
        "final_logit_softcapping": (None,),
        "attn_logit_softcapping": (None,),
    },
    requires={**_AROUND_1, "norm_position": "both", "qk_layernorm": True},
    computed=WINDOW_SETTINGS | {"embedding_multiplier", "softmax_scale"},
    reads=WINDOWS | {"query_pre_attn_scalar", "rope_local_base_freq"},
    windows_rotate_apart=True,
    read=_read_gemma3,
    write=_write_gemma3,
)
