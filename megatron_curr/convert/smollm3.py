"""SmolLM 3: ``SmolLM3ForCausalLM``. Llama that rotates nothing in some layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, TAIL
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.convert.windows import (
    WINDOW_SETTINGS,
    WINDOWS,
    read_windows,
    write_windows,
)
from megatron_curr.recipe.model import Model


def _write(model: Model) -> dict[str, Any]:
    return {
        **plain_heads(model),
        # Its 1 is a layer that rotates.
        "no_rope_layers": [int(not unrotated) for unrotated in model.unrotated_layers],
        **write_windows(model),
        "use_sliding_window": model.window_size is not None,
    }


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    unrotated = [int(not rotates) for rotates in config["no_rope_layers"]]
    window = read_windows(config) if config["use_sliding_window"] else {}
    return {**window, "no_rope_freq": unrotated if any(unrotated) else None}


FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    head=HEAD,
    layer=LAYER,
    tail=TAIL,
    names=NAMES,
    fixed={**FIXED, "attention_bias": (False,), "mlp_bias": (False,)},
    computed=WINDOW_SETTINGS | {"no_rope_freq"},
    reads=WINDOWS | {"no_rope_layers", "use_sliding_window"},
    harmless={"no_rope_layer_interval": "the class makes no_rope_layers of it"},
    write=_write,
    read=_read,
)
