"""StarCoder 2: ``Starcoder2ForCausalLM``. Llama with LayerNorms, biases and no gate."""

from __future__ import annotations

from megatron_curr.convert.family import Family, all_rows, ffn, hidden
from megatron_curr.convert.gpt_neox import weight_and_bias
from megatron_curr.convert.llama import (
    ATTENTION,
    HEAD,
    NAMES,
    QKV,
    QKV_BIASES,
    TAIL,
    layer_entry,
)
from megatron_curr.convert.qwen2 import plain_heads
from megatron_curr.convert.windows import WINDOW, WINDOW_SETTINGS, read_window, write_window

_LAYER = ("model.layers.{layer}.", "decoder.layers.{layer}.")

FAMILY = Family(
    architecture="Starcoder2ForCausalLM",
    model_type="starcoder2",
    head=HEAD,
    layer=(
        *weight_and_bias(f"{_LAYER[0]}input_layernorm", f"{_LAYER[1]}{QKV}.layer_norm_"),
        *ATTENTION,
        *QKV_BIASES,
        layer_entry("self_attn.o_proj.bias", "self_attention.linear_proj.bias", all_rows(hidden)),
        *weight_and_bias(
            f"{_LAYER[0]}post_attention_layernorm", f"{_LAYER[1]}mlp.linear_fc1.layer_norm_"
        ),
        layer_entry("mlp.c_fc.weight", "mlp.linear_fc1.weight", all_rows(ffn), hidden),
        layer_entry("mlp.c_fc.bias", "mlp.linear_fc1.bias", all_rows(ffn)),
        layer_entry("mlp.c_proj.weight", "mlp.linear_fc2.weight", all_rows(hidden), ffn),
        layer_entry("mlp.c_proj.bias", "mlp.linear_fc2.bias", all_rows(hidden)),
    ),
    tail=(*weight_and_bias("model.norm", "decoder.final_layernorm."), TAIL[-1]),
    names={
        **{name: ours for name, ours in NAMES.items() if ours != "layernorm_epsilon"},
        "norm_epsilon": "layernorm_epsilon",
    },
    fixed={"hidden_act": ("gelu_pytorch_tanh",), "use_bias": (True,)},
    requires={"normalization": "LayerNorm", "activation": "gelu_tanh", "linear_biases": "all"},
    computed=WINDOW_SETTINGS,
    reads=WINDOW,
    read=read_window,
    write=lambda model: {**plain_heads(model), **write_window(model)},
)
