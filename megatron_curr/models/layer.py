"""One transformer layer of a recipe's model, as a megatron-core spec of the backend's modules.

megatron-core's own layer has its norms before the blocks, its blocks one after the other, and norms
of queries and keys over single heads. The variants that published models need stand here; each is
the smallest change of megatron-core's class that computes it.

Legend: S sequence, B micro-batch, D hidden size, N query (or key) heads, H head dim.
"""

from __future__ import annotations

from copy import copy
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from megatron_curr.models.experts import expert_layer
from megatron_curr.models.latent_attention import latent_attention
from megatron_curr.models.norms import LayerNormWithoutBias, ProjectionNorm

if TYPE_CHECKING:
    from megatron_curr.recipe.model import Model


class ParallelResidualLayer(TransformerLayer):
    """``x + attention(norm(x)) + mlp(norm(x))``, each with a norm of its own (GPT-J, GPT-NeoX)."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's; the MLP reads what the attention read."""
        self._layer_input = hidden_states
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._layer_input = None

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        return super()._forward_pre_mlp_layernorm(self._layer_input)


class SharedNormLayer(ParallelResidualLayer):
    """``n = norm(x)``, ``x + attention(n) + mlp(n)`` (Falcon, Cohere)."""

    def _forward_pre_mlp_layernorm(self, hidden_states: Tensor) -> Tensor:
        return self.input_layernorm(self._layer_input)


class RotatedApart(SelfAttention):
    """Attention of a layer with a window, whose rotations are plain and of a base of their own."""

    def __init__(
        self,
        config: TransformerConfig,
        *args: Any,
        rotary_percent: float,
        base: float,
        **kwargs: Any,
    ) -> None:
        plain = copy(config)
        for name in [name for name in vars(plain) if name.startswith("yarn_")]:
            delattr(plain, name)  # megatron-core multiplies by YaRN's factor where it finds these
        super().__init__(plain, *args, **kwargs)
        self.rotations = RotaryEmbedding(
            config.kv_channels,
            rotary_percent,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=base,
            cp_group=self.pg_collection.cp,
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As megatron-core's, whatever the other layers' ``rotary_pos_emb`` [S, 1, 1, H]."""
        length = len(kwargs["rotary_pos_emb"]) * self.pg_collection.cp.size()
        return super().forward(
            hidden_states, *args, **{**kwargs, "rotary_pos_emb": self.rotations(length)}
        )


def layer_spec(
    backend: BackendSpecProvider, model: Model, *, has_experts: bool, is_windowed: bool
) -> ModuleSpec:
    """One transformer layer from the backend's modules; norms may be fused into linears."""
    fused_norm, shared = _fused_norm(backend, model), model.shared_residual_norm
    into_layer = fused_norm or backend.column_parallel_linear()
    own_norm = residual_norm(backend, model)
    norm = IdentityOp if fused_norm or model.norm_position == "after" else own_norm
    # Fused or not, checkpoints name the norms by the linear that follows them.
    checkpoint_names = {}
    if not model.has_latent_attention:
        checkpoint_names["input_layernorm."] = "self_attention.linear_qkv.layer_norm_"
    if not has_experts:
        checkpoint_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    dense = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=into_layer, linear_fc2=out_of_layer(backend, model)),
    )
    return ModuleSpec(
        module=_layer(model),
        submodules=TransformerLayerSubmodules(
            input_layernorm=own_norm if model.has_latent_attention else norm,
            self_attention=(
                latent_attention(backend, model)
                if model.has_latent_attention
                else _attention(backend, model, into_layer, is_windowed=is_windowed)
            ),
            self_attn_bda=get_bias_dropout_add,
            # The router and every expert read the norm's output: it is never fused.
            pre_mlp_layernorm=IdentityOp if shared else own_norm if has_experts else norm,
            mlp=expert_layer(backend) if has_experts else dense,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused_norm else checkpoint_names,
        ),
    )


def residual_norm(backend: BackendSpecProvider, model: Model) -> type:
    """The norm of hidden states."""
    if not model.layernorm_bias:
        return LayerNormWithoutBias
    return backend.layer_norm(rms_norm=model.normalization == "RMSNorm")


def _layer(model: Model) -> type:
    if model.shared_residual_norm:
        return SharedNormLayer
    return ParallelResidualLayer if model.parallel_residual else TransformerLayer


def _fused_norm(backend: BackendSpecProvider, model: Model) -> type | None:
    """A norm and the linear behind it in one, where that is the only one to read it."""
    apart = model.norm_position == "after" or model.shared_residual_norm or not model.layernorm_bias
    return None if apart else backend.column_parallel_layer_norm_linear()


def _attention(
    backend: BackendSpecProvider, model: Model, into_layer: type, *, is_windowed: bool
) -> ModuleSpec:
    norms: list[Any] = [IdentityOp, IdentityOp]
    if model.qk_layernorm and model.qk_layernorm_over == "head":
        norms = [backend.layer_norm(rms_norm=True, for_qk=True)] * 2
    elif model.qk_layernorm:
        heads = (model.num_attention_heads, model.num_query_groups)
        norms = [ModuleSpec(module=ProjectionNorm, params={"num_heads": n}) for n in heads]
    module, params = SelfAttention, {"attn_mask_type": AttnMaskType.causal}
    if is_windowed and model.window_rotary_base is not None:
        module = RotatedApart
        params |= {"rotary_percent": model.rotary_percent, "base": model.window_rotary_base}
    return ModuleSpec(
        module=module,
        params=params,
        submodules=SelfAttentionSubmodules(
            linear_qkv=into_layer,
            core_attention=backend.core_attention(),
            linear_proj=out_of_layer(backend, model),
            q_layernorm=norms[0],
            k_layernorm=norms[1],
        ),
    )


def out_of_layer(backend: BackendSpecProvider, model: Model) -> type:
    """The linear that writes into the residual stream."""
    linear = backend.row_parallel_linear()
    if model.linear_biases == "into_residual":
        return _with_bias(linear)
    if model.norm_position != "before":
        linear = _with_norm_after(linear, backend.layer_norm(rms_norm=True))
    if model.residual_multiplier != 1.0:
        linear = _multiplied(linear, model.residual_multiplier)
    return linear


@cache
def _with_bias(linear: type) -> type:
    class BiasedLinear(linear):
        """The linear with a bias, whatever the model's other linears have."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "bias": True})

    return BiasedLinear


@cache
def _with_norm_after(linear: type, norm: type) -> type:
    class NormedLinear(linear):
        """The linear with a norm of its output, before that is added to the residual stream."""

        def __init__(self, input_size: int, output_size: int, **kwargs: Any) -> None:
            super().__init__(input_size, output_size, **kwargs)
            config = kwargs["config"]
            self.post_norm = norm(
                config=config, hidden_size=output_size, eps=config.layernorm_epsilon
            )

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """The normalised output, [S, B, D], and no bias."""
            out, bias = super().forward(x)
            assert bias is None
            return self.post_norm(out), None

    return NormedLinear


@cache
def _multiplied(linear: type, factor: float) -> type:
    class MultipliedLinear(linear):
        """The linear with a factor on its output and on its bias (Granite's residual one)."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
            """The output, [S, B, D], and the bias that is added to it later."""
            out, bias = super().forward(x)
            return out * factor, None if bias is None else bias * factor

    return MultipliedLinear


def activation(model: Model) -> dict[str, Any]:
    """What ``TransformerConfig`` is told about the MLP's non-linearity."""
    if model.activation == "swiglu":
        return {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu}
    # megatron-core's fused gelu is the tanh approximation, and others it compiles: never fused.
    return {
        "gated_linear_unit": model.is_gated,
        "activation_func": _ACTIVATIONS[model.activation],
        "bias_activation_fusion": False,
    }


def _gelu_tanh(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    return torch.nn.functional.relu(x).square()


_ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "geglu_tanh": _gelu_tanh,
    "squared_relu": _squared_relu,
}
