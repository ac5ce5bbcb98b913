"""Mistral, dense: ``MistralForCausalLM``. Llama, once no window is shorter than the sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, TAIL
from megatron_curr.errors import CheckpointError

WINDOW = frozenset({"sliding_window", "max_position_embeddings"})
"""Config fields that ``whole_window`` reads."""


def whole_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nothing to set. Raises ``CheckpointError`` for attention that does not see everything."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    if window is not None and window < longest:
        raise CheckpointError(
            f"config.json: sliding_window {window} is shorter than max_position_embeddings "
            f"{longest}, and our attention has no window; for training on at most {window} tokens "
            f"the two agree: set max_position_embeddings to {window}"
        )
    return {}


def whole_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """As ``whole_window``, of the layers that ``layer_types`` gives one."""
    layers = set(config["layer_types"])
    if foreign := layers - {"full_attention", "sliding_attention"}:
        raise CheckpointError(
            f"config.json: layer_types has {', '.join(sorted(foreign))}, which our layers are not"
        )
    return whole_window(config) if "sliding_attention" in layers else {}


FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    head=HEAD,
    layer=LAYER,
    tail=TAIL,
    names=NAMES,
    fixed=FIXED,
    reads=WINDOW,
    write=lambda model: {"sliding_window": None},
    read=whole_window,
)
