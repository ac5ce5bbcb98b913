"""Qwen 3, dense: ``Qwen3ForCausalLM``. Llama with norms of every head's queries and keys."""

from __future__ import annotations

from megatron_curr.convert.family import Family, all_rows, head_width
from megatron_curr.convert.llama import FIXED, HEAD, LAYER, NAMES, SHARED, TAIL, layer_entry

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
    fixed={**FIXED, "attention_bias": (False,), "use_sliding_window": (False,)},
    requires={"qk_layernorm": True},
    computed=SHARED,
)
