"""Nemotron 3, 4, Minitron: ``NemotronForCausalLM``. LayerNorms around 1, squared ReLU, no gate."""

from __future__ import annotations

from megatron_curr.convert.family import Family, all_rows, ffn, hidden
from megatron_curr.convert.gpt_neox import weight_and_bias
from megatron_curr.convert.llama import ATTENTION, HEAD, NAMES, QKV, TAIL, layer_entry

_LAYER = ("model.layers.{layer}.", "decoder.layers.{layer}.")

FAMILY = Family(
    architecture="NemotronForCausalLM",
    model_type="nemotron",
    head=HEAD,
    layer=(
        *weight_and_bias(f"{_LAYER[0]}input_layernorm", f"{_LAYER[1]}{QKV}.layer_norm_"),
        *ATTENTION,
        *weight_and_bias(
            f"{_LAYER[0]}post_attention_layernorm", f"{_LAYER[1]}mlp.linear_fc1.layer_norm_"
        ),
        layer_entry("mlp.up_proj.weight", "mlp.linear_fc1.weight", all_rows(ffn), hidden),
        layer_entry("mlp.down_proj.weight", "mlp.linear_fc2.weight", all_rows(hidden), ffn),
    ),
    tail=(*weight_and_bias("model.norm", "decoder.final_layernorm."), TAIL[-1]),
    names={
        **{name: ours for name, ours in NAMES.items() if ours != "layernorm_epsilon"},
        "norm_eps": "layernorm_epsilon",
    },
    fixed={"hidden_act": ("relu2",), "attention_bias": (False,), "mlp_bias": (False,)},
    requires={
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "activation": "squared_relu",
    },
    is_partly_rotated=True,
)
