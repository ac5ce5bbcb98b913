"""Qwen 3, dense: ``Qwen3ForCausalLM``. Llama with norms of every head's queries and keys."""

from __future__ import annotations

from megatron_curr.convert.family import Family, all_rows, head_width
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, TAIL, layer_entry
from megatron_curr.convert.qwen2 import QWEN_WINDOWS, write_qwen_windows
from megatron_curr.convert.windows import WINDOW_SETTINGS, read_windows

QUERY_KEY_NORMS = tuple(
    layer_entry(
        f"self_attn.{letter}_norm.weight",
        f"self_attention.{letter}_layernorm.weight",
        all_rows(head_width),
    )
    for letter in "qk"
)

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    head=HEAD,
    layer=(*LAYER, *QUERY_KEY_NORMS),
    tail=TAIL,
    names=NAMES,
    fixed={**FIXED, "attention_bias": (False,)},
    requires={"qk_layernorm": True},
    computed=WINDOW_SETTINGS,
    reads=QWEN_WINDOWS,
    read=read_windows,
    write=write_qwen_windows,
)
