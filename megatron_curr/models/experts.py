"""Mixture of experts: megatron-core's layer with a router whose balancing loss ignores the layout.

Each token of a layer goes to the ``moe_router_topk`` experts its router scores highest, by
all-to-all between the ranks that share the experts out.

megatron-core 0.16.1 knows three balancing losses. ``aux_loss`` is taken over a micro-batch and
``global_aux_loss`` over the micro-batches seen so far, so both change with the micro-batch and the
number of data-parallel ranks. ``seq_aux_loss`` is taken over each sequence: the one used here. All
three are multiplied by the number of tokens of the rank, to undo the division by the tokens of the
global batch; but a rank that holds 1/n of a sequence (tensor x context ranks) adds 1/n of its loss
already, so the sum comes out n times too small, and ``seq_aux_loss`` once more by the number of
sequences of a micro-batch. ``Router`` counts the tokens of the whole micro-batch instead.

Legend: S sequence, B micro-batch, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn

from megatron_curr.models.backend import experts_of, have_transformer_engine

if TYPE_CHECKING:
    from megatron_curr.recipe.model import Model
    from megatron_curr.recipe.parallel import Parallel


class Router(TopKRouter):
    """Top-k router; the gradient of its balancing loss is the same in every layout."""

    def attach_and_log_load_balancing_loss(
        self,
        activation: Tensor,
        aux_loss_coeff: float,
        aux_loss: Tensor,
        aux_loss_name: str,
        reduce_group: torch.distributed.ProcessGroup,
        reduce_group_has_dp: bool = False,
        valid_token_count: int | Tensor | None = None,
    ) -> Tensor:
        """Make ``aux_loss``, this rank's part of the micro-batch's mean, part of what is minimised.

        ``activation`` holds the router's weights of this rank's tokens, [S*B, E]. Nothing is kept
        for logging: megatron-core's record is one for the process, whatever models live in it.
        """
        assert self.calculate_per_token_loss
        num_tokens = activation.shape[0] * reduce_group.size()
        return MoEAuxLossAutoScaler.apply(activation, aux_loss * num_tokens)


def expert_layer(backend: BackendSpecProvider) -> ModuleSpec:
    """What stands in for the MLP of a layer with experts."""
    module, submodules = experts_of(backend)
    linears = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear()
    )
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=module, submodules=submodules),
            shared_experts=ModuleSpec(module=SharedExpertMLP, submodules=linears),
            router=Router,
        ),
    )


def mark_expert_parameters(chunk: nn.Module, *, tp_size: int, etp_size: int) -> None:
    """Have experts' gradients reduced over the ranks that hold copies of them.

    megatron-core marks them only where experts are shared out. With one expert rank, and experts
    cut over fewer ranks than the rest, it reduces them like the rest: over too few ranks.
    """
    if etp_size == tp_size:
        return
    for layer in chunk.modules():
        if isinstance(layer, MoELayer):
            for parameter in layer.experts.parameters():
                parameter.allreduce = False


def expert_biases(chunks: Sequence[nn.Module]) -> list[Tensor]:
    """The bias of every router of these chunks that has one; moved by ``finalize_model_grads``."""
    return [
        module.expert_bias
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(module, TopKRouter) and module.expert_bias is not None
    ]


def expert_settings(model: Model, *, parallel: Parallel) -> dict[str, Any]:
    """What ``TransformerConfig`` is told about experts; nothing for a dense model."""
    if model.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_ffn_hidden_size": model.expert_ffn_hidden_size,
        "moe_layer_freq": [int(has_experts) for has_experts in model.moe_layers],
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_router_topk": model.moe_router_topk,
        "moe_router_score_function": model.moe_router_score_function,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_num_groups": model.moe_router_num_groups,
        "moe_router_group_topk": model.moe_router_group_topk,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_load_balancing_type": "seq_aux_loss" if model.moe_aux_loss_coeff else "none",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": have_transformer_engine(),
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tp_size,
    }
