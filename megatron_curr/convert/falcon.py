"""Falcon 40B, 180B and Falcon 2: ``FalconForCausalLM`` of the newer decoder.

Attention and MLP read the layer's input side by side, each through a norm of its own, and the fused
projection has each group's queries, key and value together: ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import (
    Entry,
    Family,
    RowsOf,
    WidthOf,
    all_rows,
    ffn,
    hidden,
    untied,
)
from megatron_curr.convert.gpt_neox import weight_and_bias
from megatron_curr.convert.llama import QKV
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.model import Model

_LAYER = ("transformer.h.{layer}.", "decoder.layers.{layer}.")


def _linear(published: str, stored: str, rows: RowsOf, columns: WidthOf) -> Entry:
    return Entry(f"{_LAYER[0]}{published}.weight", f"{_LAYER[1]}{stored}.weight", rows, columns)


def _fused_width(model: Model) -> int:
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["num_ln_in_parallel_attn"] not in (None, 2):
        raise CheckpointError(
            f"config.json: num_ln_in_parallel_attn is {config['num_ln_in_parallel_attn']}; our "
            "attention and MLP side by side have a norm each"
        )
    return {}


FAMILY = Family(
    architecture="FalconForCausalLM",
    model_type="falcon",
    head=(
        Entry(
            "transformer.word_embeddings.weight", "embedding.word_embeddings.weight", None, hidden
        ),
    ),
    layer=(
        *weight_and_bias(f"{_LAYER[0]}ln_attn", f"{_LAYER[1]}{QKV}.layer_norm_"),
        _linear("self_attention.query_key_value", QKV, all_rows(_fused_width), hidden),
        _linear("self_attention.dense", "self_attention.linear_proj", all_rows(hidden), hidden),
        *weight_and_bias(f"{_LAYER[0]}ln_mlp", f"{_LAYER[1]}mlp.linear_fc1.layer_norm_"),
        _linear("mlp.dense_h_to_4h", "mlp.linear_fc1", all_rows(ffn), hidden),
        _linear("mlp.dense_4h_to_h", "mlp.linear_fc2", all_rows(hidden), ffn),
    ),
    tail=(
        *weight_and_bias("transformer.ln_f", "decoder.final_layernorm."),
        Entry("lm_head.weight", "output_layer.weight", None, hidden, when=untied),
    ),
    names={
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "num_kv_heads": "num_query_groups",
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_epsilon": "layernorm_epsilon",
    },
    fixed={
        "activation": ("gelu",),
        "new_decoder_architecture": (True,),
        "alibi": (False,),
        "bias": (False,),
        "parallel_attn": (True,),
    },
    requires={"normalization": "LayerNorm", "activation": "gelu", "parallel_residual": True},
    computed=frozenset({"kv_channels"}),
    reads=frozenset({"num_ln_in_parallel_attn"}),
    harmless={"multi_query": "new_decoder_architecture says it with num_kv_heads"},
    read=_read,
    write=lambda model: {**plain_heads(model), "num_ln_in_parallel_attn": 2},
)
