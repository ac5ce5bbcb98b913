"""Falcon, without ALiBi: ``FalconForCausalLM``.

Attention and MLP read the layer's input side by side, through one norm (7B) or each through its own
(40B), and the fused projection has each group's queries, key and value together: ours. The newer
decoder's config can say both, so that is what is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
    heads, norms = config["num_attention_heads"], config["num_ln_in_parallel_attn"]
    if config["new_decoder_architecture"]:
        groups, norms = config["num_kv_heads"], 2 if norms is None else norms
    else:
        groups, norms = 1 if config["multi_query"] else heads, 1 if norms is None else norms
    if norms == 2 and not config["new_decoder_architecture"]:
        raise CheckpointError(
            "config.json: num_ln_in_parallel_attn is 2 and new_decoder_architecture false, of "
            "which the published code uses one norm and leaves the other"
        )
    return {"num_query_groups": groups, "shared_residual_norm": norms == 1}


def _write(model: Model) -> dict[str, Any]:
    plain_heads(model)
    return {
        "new_decoder_architecture": True,
        "num_kv_heads": model.num_query_groups,
        "num_ln_in_parallel_attn": 1 if model.shared_residual_norm else 2,
    }


def _has_own_norms(model: Model) -> bool:
    return not model.shared_residual_norm


def _has_shared_norm(model: Model) -> bool:
    return model.shared_residual_norm


FAMILY = Family(
    architecture="FalconForCausalLM",
    model_type="falcon",
    head=(
        Entry(
            "transformer.word_embeddings.weight", "embedding.word_embeddings.weight", None, hidden
        ),
    ),
    layer=(
        *(
            replace(entry, when=_has_own_norms)
            for entry in (
                *weight_and_bias(f"{_LAYER[0]}ln_attn", f"{_LAYER[1]}{QKV}.layer_norm_"),
                *weight_and_bias(f"{_LAYER[0]}ln_mlp", f"{_LAYER[1]}mlp.linear_fc1.layer_norm_"),
            )
        ),
        *(
            replace(entry, when=_has_shared_norm)
            for entry in weight_and_bias(
                f"{_LAYER[0]}input_layernorm", f"{_LAYER[1]}{QKV}.layer_norm_"
            )
        ),
        _linear("self_attention.query_key_value", QKV, all_rows(_fused_width), hidden),
        _linear("self_attention.dense", "self_attention.linear_proj", all_rows(hidden), hidden),
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
        "max_position_embeddings": "max_position_embeddings",
        "layer_norm_epsilon": "layernorm_epsilon",
    },
    fixed={
        "activation": ("gelu",),
        "alibi": (False,),
        "bias": (False,),
        "parallel_attn": (True,),
    },
    requires={"normalization": "LayerNorm", "activation": "gelu", "parallel_residual": True},
    computed=frozenset({"kv_channels", "num_query_groups", "shared_residual_norm"}),
    reads=frozenset(
        {"num_ln_in_parallel_attn", "num_kv_heads", "multi_query", "new_decoder_architecture"}
    ),
    read=_read,
    write=_write,
)
