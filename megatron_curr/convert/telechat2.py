"""TeleChat 2, dense: ``TeleChat2ForCausalLM``. Llama with biases into the residual stream.

Keys and values are fused, each head's key before its value: a part of our fused projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import (
    Entry,
    Family,
    Rows,
    RowsOf,
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
)
from megatron_curr.convert.llama import QKV
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.model import Model


def _layer(published: str, stored: str, rows: RowsOf, columns: WidthOf | None = None) -> Entry:
    prefix = ("transformer.h.{layer}.", "decoder.layers.{layer}.")
    return Entry(prefix[0] + published, prefix[1] + stored, rows, columns)


def _key_value_rows(model: Model) -> Rows:
    return tuple((start, end + model.kv_channels) for start, end in key_rows(model))


def _write(model: Model) -> dict[str, Any]:
    plain_heads(model)
    length = model.max_position_embeddings
    # Beyond training_seqlen the published code stretches rotations; up to it they are plain.
    return {"seq_length": length, "base_seqlen": length, "training_seqlen": length}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    base, longest = config["base_seqlen"], config["training_seqlen"]
    if base != longest or not base:
        raise CheckpointError(
            f"config.json: base_seqlen {base} and training_seqlen {longest} differ, so rotations "
            "are stretched, which megatron-core has not in this form"
        )
    heads = config["n_head"]
    return {
        "max_position_embeddings": longest,
        "num_query_groups": config["num_key_value_heads"] or heads,
    }


FAMILY = Family(
    architecture="TeleChat2ForCausalLM",
    model_type="telechat",
    also_known_as=("Telechat2ForCausalLM", "TelechatForCausalLM", "TeleChatForCausalLM"),
    head=(
        Entry(
            "transformer.word_embeddings.weight", "embedding.word_embeddings.weight", None, hidden
        ),
    ),
    layer=(
        _layer("input_layernorm.weight", f"{QKV}.layer_norm_weight", all_rows(hidden)),
        _layer("self_attention.query.weight", f"{QKV}.weight", query_rows, hidden),
        _layer("self_attention.key_value.weight", f"{QKV}.weight", _key_value_rows, hidden),
        _layer(
            "self_attention.dense.weight",
            "self_attention.linear_proj.weight",
            all_rows(hidden),
            query_width,
        ),
        _layer("self_attention.dense.bias", "self_attention.linear_proj.bias", all_rows(hidden)),
        _layer(
            "post_attention_layernorm.weight",
            "mlp.linear_fc1.layer_norm_weight",
            all_rows(hidden),
        ),
        _layer("mlp.gate_proj.weight", "mlp.linear_fc1.weight", gate_rows(ffn), hidden),
        _layer("mlp.up_proj.weight", "mlp.linear_fc1.weight", up_rows(ffn), hidden),
        _layer("mlp.down_proj.weight", "mlp.linear_fc2.weight", all_rows(hidden), ffn),
        _layer("mlp.down_proj.bias", "mlp.linear_fc2.bias", all_rows(hidden)),
    ),
    tail=(
        Entry("transformer.ln_f.weight", "decoder.final_layernorm.weight", all_rows(hidden)),
        Entry("lm_head.weight", "output_layer.weight", None, hidden, when=untied),
    ),
    names={
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "num_key_value_heads": "num_query_groups",
        "layer_norm_epsilon": "layernorm_epsilon",
    },
    fixed={
        "apply_residual_connection_post_layernorm": (False,),
        "embed_layernorm": (False,),
    },
    requires={"linear_biases": "into_residual"},
    computed=frozenset({"max_position_embeddings", "kv_channels"}),
    stretched=frozenset(),
    reads=frozenset({"base_seqlen", "training_seqlen"}),
    harmless={"seq_length": "the published code reads training_seqlen"},
    # Of the published configuration_telechat2.py.
    defaults={
        "vocab_size": 160_256,
        "hidden_size": 4096,
        "n_layer": 30,
        "n_head": 32,
        "num_key_value_heads": None,
        "ffn_hidden_size": 12_288,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "apply_residual_connection_post_layernorm": False,
        "embed_layernorm": False,
        "seq_length": 8192,
        "training_seqlen": 8192,
        "base_seqlen": 8192,
        "tie_word_embeddings": False,
    },
    write=_write,
    read=_read,
)
