"""Qwen 2 and 2.5, dense: ``Qwen2ForCausalLM``. Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, QKV_BIASES, TAIL
from megatron_curr.convert.windows import (
    WINDOW_SETTINGS,
    WINDOWS,
    read_windows,
    write_windows,
)
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.model import Model


def plain_heads(model: Model) -> dict[str, Any]:
    """Nothing to write, once the head dim is that which the config implies."""
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise RecipeError(
            f"kv_channels is {model.kv_channels}, there hidden_size / num_attention_heads"
        )
    return {}


QWEN_WINDOWS = WINDOWS | {"use_sliding_window", "max_window_layers"}
"""Config fields that say which layers look through a window."""


def write_qwen_windows(model: Model) -> dict[str, Any]:
    """``layer_types``, and what says that they count."""
    # The first of these layers are without a window, which version 4 of transformers asks for.
    whole = model.windowed_layers.index(True) if True in model.windowed_layers else 0
    return {
        **write_windows(model),
        "use_sliding_window": model.window_size is not None,
        "max_window_layers": whole if model.window_size else model.num_layers,
    }


FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    head=HEAD,
    layer=(*LAYER, *QKV_BIASES),
    tail=TAIL,
    names=NAMES,
    fixed=FIXED,
    requires={"add_qkv_bias": True},
    computed=WINDOW_SETTINGS,
    reads=QWEN_WINDOWS,
    read=read_windows,
    write=lambda model: {**plain_heads(model), **write_qwen_windows(model)},
)
