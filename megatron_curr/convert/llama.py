"""Llama 2, 3, 3.1 and later: ``LlamaForCausalLM``; the table that most others vary."""

from __future__ import annotations

from collections.abc import Callable

from megatron_curr.convert.family import (
    Entry,
    Family,
    RowsOf,
    Where,
    WidthOf,
    all_rows,
    ffn,
    gate_rows,
    hidden,
    key_rows,
    query_rows,
    query_width,
    untied,
    up_rows,
    value_rows,
)
from megatron_curr.recipe.model import Model

HEAD = (Entry("model.embed_tokens.weight", "embedding.word_embeddings.weight", None, hidden),)
TAIL = (
    Entry("model.norm.weight", "decoder.final_layernorm.weight", all_rows(hidden)),
    Entry("lm_head.weight", "output_layer.weight", None, hidden, when=untied),
)
QKV = "self_attention.linear_qkv"


def layer_entry(
    published: str,
    stored: str,
    rows: RowsOf,
    columns: WidthOf | None = None,
    where: Where = "every",
    when: Callable[[Model], bool] = lambda model: True,
) -> Entry:
    """A tensor that layers have, by its names inside the layer."""
    prefix = ("model.layers.{layer}.", "decoder.layers.{layer}.")
    return Entry(prefix[0] + published, prefix[1] + stored, rows, columns, where, when)


def gated_mlp(
    published: str, stored: str, width: WidthOf, *, where: Where, names: tuple[str, str, str]
) -> tuple[Entry, ...]:
    """Gate, up and down of a SwiGLU under these published names."""
    gate, up, down = (f"{published}.{name}.weight" for name in names)
    return (
        layer_entry(gate, f"{stored}.linear_fc1.weight", gate_rows(width), hidden, where),
        layer_entry(up, f"{stored}.linear_fc1.weight", up_rows(width), hidden, where),
        layer_entry(down, f"{stored}.linear_fc2.weight", all_rows(hidden), width, where),
    )


GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
INPUT_NORM = layer_entry("input_layernorm.weight", f"{QKV}.layer_norm_weight", all_rows(hidden))
ATTENTION = (
    layer_entry("self_attn.q_proj.weight", f"{QKV}.weight", query_rows, hidden),
    layer_entry("self_attn.k_proj.weight", f"{QKV}.weight", key_rows, hidden),
    layer_entry("self_attn.v_proj.weight", f"{QKV}.weight", value_rows, hidden),
    layer_entry(
        "self_attn.o_proj.weight",
        "self_attention.linear_proj.weight",
        all_rows(hidden),
        query_width,
    ),
)
QKV_BIASES = (
    layer_entry("self_attn.q_proj.bias", f"{QKV}.bias", query_rows),
    layer_entry("self_attn.k_proj.bias", f"{QKV}.bias", key_rows),
    layer_entry("self_attn.v_proj.bias", f"{QKV}.bias", value_rows),
)
MLP_NORM = (
    layer_entry(
        "post_attention_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight",
        all_rows(hidden),
        where="dense",
    ),
    # A layer with experts keeps its norm apart: the router and every expert read it.
    layer_entry(
        "post_attention_layernorm.weight",
        "pre_mlp_layernorm.weight",
        all_rows(hidden),
        where="sparse",
    ),
)
MLP = gated_mlp("mlp", "mlp", ffn, where="dense", names=GATE_UP_DOWN)
LAYER = (INPUT_NORM, *ATTENTION, *MLP_NORM, *MLP)

NAMES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
}
FIXED = {"hidden_act": ("silu",)}


FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    also_known_as=("InternLM3ForCausalLM",),
    also_of_type=("internlm3",),  # of which transformers makes a Llama
    head=HEAD,
    layer=LAYER,
    tail=TAIL,
    names=NAMES,
    fixed={**FIXED, "attention_bias": (False,), "mlp_bias": (False,)},
)
