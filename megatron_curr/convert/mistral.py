"""Mistral, dense: ``MistralForCausalLM``. Llama, whose attention may have a window."""

from __future__ import annotations

from megatron_curr.convert.family import Family
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, TAIL
from megatron_curr.convert.windows import WINDOW, WINDOW_SETTINGS, read_window, write_window

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    head=HEAD,
    layer=LAYER,
    tail=TAIL,
    names=NAMES,
    fixed=FIXED,
    computed=WINDOW_SETTINGS,
    reads=WINDOW,
    write=write_window,
    read=read_window,
)
