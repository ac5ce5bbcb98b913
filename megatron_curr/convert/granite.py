"""Granite 3 and later, dense: ``GraniteForCausalLM``. Llama with four factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, TAIL
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.recipe.model import Model


def _write(model: Model) -> dict[str, Any]:
    plain_heads(model)
    return {"attention_multiplier": model.softmax_scale or 1 / math.sqrt(model.kv_channels)}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    scale = float(config["attention_multiplier"])
    return {"softmax_scale": None if scale == 1 / math.sqrt(width) else scale}


FAMILY = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    head=HEAD,
    layer=LAYER,
    tail=TAIL,
    names={
        **NAMES,
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_scaling": "logits_scaling",
    },
    fixed={**FIXED, "attention_bias": (False,), "mlp_bias": (False,)},
    computed=frozenset({"softmax_scale"}),
    reads=frozenset({"attention_multiplier"}),
    write=_write,
    read=_read,
)
