"""OLMo 3: ``Olmo3ForCausalLM``. OLMo 2 with a window in some layers, which are not stretched."""

from __future__ import annotations

from dataclasses import replace

from megatron_curr.convert import olmo2
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.convert.windows import (
    WINDOW_SETTINGS,
    WINDOWS,
    read_windows,
    write_windows,
)

FAMILY = replace(
    olmo2.FAMILY,
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    computed=WINDOW_SETTINGS,
    reads=WINDOWS,
    read=read_windows,
    windows_rotate_apart=True,
    write=lambda model: {**plain_heads(model), **write_windows(model)},
)
