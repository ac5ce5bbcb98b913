"""Phi 3 and Phi 4, dense: ``Phi3ForCausalLM``. Llama with fused projections.

All queries come before all keys and all values; ours have each group's together.
"""

from __future__ import annotations

from megatron_curr.convert.family import (
    Family,
    Rows,
    all_rows,
    ffn,
    hidden,
    key_rows,
    query_rows,
    query_width,
    value_rows,
)
from megatron_curr.convert.llama import (
    FIXED,
    HEAD,
    INPUT_NORM,
    MLP_NORM,
    NAMES,
    QKV,
    TAIL,
    layer_entry,
)
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.convert.windows import WINDOW, WINDOW_SETTINGS, read_window, write_window
from megatron_curr.recipe.model import Model


def _query_key_value_rows(model: Model) -> Rows:
    return (*query_rows(model), *key_rows(model), *value_rows(model))


FUSED_MLP = (
    layer_entry(
        "mlp.gate_up_proj.weight",
        "mlp.linear_fc1.weight",
        all_rows(lambda model: 2 * model.ffn_hidden_size),
        hidden,
    ),
    layer_entry("mlp.down_proj.weight", "mlp.linear_fc2.weight", all_rows(hidden), ffn),
)
"""A SwiGLU whose gate comes before its linear branch in one tensor, as in ours."""

FAMILY = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    head=HEAD,
    layer=(
        INPUT_NORM,
        layer_entry("self_attn.qkv_proj.weight", f"{QKV}.weight", _query_key_value_rows, hidden),
        layer_entry(
            "self_attn.o_proj.weight",
            "self_attention.linear_proj.weight",
            all_rows(hidden),
            query_width,
        ),
        *MLP_NORM,
        *FUSED_MLP,
    ),
    tail=TAIL,
    names=NAMES,
    fixed=FIXED,
    computed=WINDOW_SETTINGS,
    reads=WINDOW,
    read=read_window,
    write=lambda model: {**plain_heads(model), **write_window(model)},
    stretched=frozenset(),  # the class knows longrope alone
    is_partly_rotated=True,
)
