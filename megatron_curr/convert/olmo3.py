"""OLMo 3: ``Olmo3ForCausalLM``. OLMo 2, once no window is shorter than the sequences."""

from __future__ import annotations

from dataclasses import replace

from megatron_curr.convert import olmo2
from megatron_curr.convert.mistral import WINDOW, whole_windows
from megatron_curr.convert.qwen2 import plain_heads

FAMILY = replace(
    olmo2.FAMILY,
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    reads=WINDOW | {"layer_types"},
    read=whole_windows,
    rotated_apart=("full_attention", "sliding_attention"),
    write=lambda model: {
        **plain_heads(model),
        "sliding_window": model.max_position_embeddings,  # the class asks for one
        "layer_types": ["full_attention"] * model.num_layers,
    },
)
