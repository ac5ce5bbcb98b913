"""Windows of attention in a ``config.json``: of every layer, or of those ``layer_types`` names.

A window that no text is longer than is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.model import Model

WINDOW = frozenset({"sliding_window", "max_position_embeddings"})
"""Config fields that ``read_window`` looks at."""
WINDOWS = WINDOW | {"layer_types"}
"""Config fields that ``read_windows`` looks at."""
WINDOW_SETTINGS = frozenset({"window_size", "window_attn_skip_freq"})
"""Settings of ``Model`` that both give."""
FULL, SLIDING = "full_attention", "sliding_attention"


def read_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """The window of every layer."""
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings") or 0
    return {} if window is None or window >= longest else {"window_size": window}


def write_window(model: Model) -> dict[str, Any]:
    """Inverse of ``read_window``. Raises ``RecipeError`` where some layers have none."""
    if model.window_size is not None and not all(model.windowed_layers):
        raise RecipeError("window_attn_skip_freq leaves layers without a window, there all have it")
    return {"sliding_window": model.window_size}


def read_windows(config: Mapping[str, Any]) -> dict[str, Any]:
    """The windows of some layers. Raises ``CheckpointError`` for layers of another kind."""
    layers = config["layer_types"]
    if foreign := set(layers) - {FULL, SLIDING}:
        raise CheckpointError(
            f"config.json: layer_types has {', '.join(sorted(foreign))}, which our layers are not"
        )
    # Layers that rotate by a base of their own are told by their window, as long as it may be.
    rotate_apart = config.get("rope_of_windows", config["rope"]) != config["rope"]
    if SLIDING not in layers or not (read_window(config) or rotate_apart):
        return {}
    return {
        "window_size": config["sliding_window"],
        "window_attn_skip_freq": [int(layer == SLIDING) for layer in layers],
    }


def write_windows(model: Model) -> dict[str, Any]:
    """Inverse of ``read_windows``."""
    layers = [SLIDING if windowed else FULL for windowed in model.windowed_layers]
    # Some classes ask for a window though no layer has one.
    return {
        "sliding_window": model.window_size or model.max_position_embeddings,
        "layer_types": layers,
    }
