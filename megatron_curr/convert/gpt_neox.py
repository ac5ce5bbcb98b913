"""GPT-NeoX and Pythia: ``GPTNeoXForCausalLM``.

Its fused projection has each head's query, key and value together: ours, with a group a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Entry, Family, RowsOf, all_rows, ffn, hidden, untied
from megatron_curr.convert.llama import QKV
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.model import Model


def weight_and_bias(published: str, stored: str) -> tuple[Entry, Entry]:
    """Weight and bias of a norm; ``stored`` ends where the two words differ."""
    return (
        Entry(f"{published}.weight", f"{stored}weight", all_rows(hidden)),
        Entry(f"{published}.bias", f"{stored}bias", all_rows(hidden)),
    )


def _linear(published: str, stored: str, rows: RowsOf, columns: Any) -> tuple[Entry, Entry]:
    prefix, ours = "gpt_neox.layers.{layer}.", "decoder.layers.{layer}."
    return (
        Entry(f"{prefix}{published}.weight", f"{ours}{stored}.weight", rows, columns),
        Entry(f"{prefix}{published}.bias", f"{ours}{stored}.bias", rows),
    )


def _write(model: Model) -> dict[str, Any]:
    plain_heads(model)
    if model.num_query_groups != model.num_attention_heads:
        raise RecipeError(
            f"num_query_groups is {model.num_query_groups}, there one for each of the "
            f"{model.num_attention_heads} heads"
        )
    # What version 4 of transformers reads.
    return {"rotary_pct": model.rotary_percent, "rotary_emb_base": model.rotary_base}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"num_query_groups": config["num_attention_heads"]}


FAMILY = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    head=(Entry("gpt_neox.embed_in.weight", "embedding.word_embeddings.weight", None, hidden),),
    layer=(
        *weight_and_bias(
            "gpt_neox.layers.{layer}.input_layernorm", f"decoder.layers.{{layer}}.{QKV}.layer_norm_"
        ),
        *_linear(
            "attention.query_key_value", QKV, lambda model: ((0, 3 * model.hidden_size),), hidden
        ),
        *_linear("attention.dense", "self_attention.linear_proj", all_rows(hidden), hidden),
        *weight_and_bias(
            "gpt_neox.layers.{layer}.post_attention_layernorm",
            "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_",
        ),
        *_linear("mlp.dense_h_to_4h", "mlp.linear_fc1", all_rows(ffn), hidden),
        *_linear("mlp.dense_4h_to_h", "mlp.linear_fc2", all_rows(hidden), ffn),
    ),
    tail=(
        *weight_and_bias("gpt_neox.final_layer_norm", "decoder.final_layernorm."),
        Entry("embed_out.weight", "output_layer.weight", None, hidden, when=untied),
    ),
    names={
        "hidden_size": "hidden_size",
        "intermediate_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_eps": "layernorm_epsilon",
        "use_parallel_residual": "parallel_residual",
    },
    fixed={"hidden_act": ("gelu",), "attention_bias": (True,)},
    requires={"normalization": "LayerNorm", "activation": "gelu", "linear_biases": "all"},
    computed=frozenset({"num_query_groups", "kv_channels"}),
    is_partly_rotated=True,
    write=_write,
    read=_read,
)
