"""Qwen 2 and 2.5, dense: ``Qwen2ForCausalLM``. Llama with biases of queries, keys and values."""

from __future__ import annotations

from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, QKV_BIASES, TAIL
from megatron_curr.convert.mistral import WINDOW, whole_windows
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.model import Model


def plain_heads(model: Model) -> dict[str, Any]:
    """Nothing to write, once the head dim is that which the config implies."""
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise RecipeError(
            f"kv_channels is {model.kv_channels}, there hidden_size / num_attention_heads"
        )
    return {}


QWEN_WINDOW = WINDOW | {"layer_types", "use_sliding_window", "max_window_layers"}
"""Config fields that say which layers look through a window."""

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    head=HEAD,
    layer=(*LAYER, *QKV_BIASES),
    tail=TAIL,
    names=NAMES,
    fixed=FIXED,
    requires={"add_qkv_bias": True},
    reads=QWEN_WINDOW,
    read=whole_windows,
    write=lambda model: {**plain_heads(model), "use_sliding_window": False},
)
