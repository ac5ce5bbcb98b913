"""What megatron-core's configuration says of the layout and the machine, for every model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from megatron_curr.models.backend import have_fused_weight_gradients, have_transformer_engine
from megatron_curr.recipe.context_rules import hierarchical_sizes

if TYPE_CHECKING:
    from megatron_curr.recipe.model import Model
    from megatron_curr.recipe.parallel import Parallel
    from megatron_curr.recipe.video_model import VideoDiT

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layout_settings(
    model: Model | VideoDiT, *, parallel: Parallel, precision: str
) -> dict[str, Any]:
    """Arguments of ``TransformerConfig``; ``precision`` is ``fp32`` or ``bf16``.

    Losses are summed, and gradients divided by a global count at the end of the step
    (``calculate_per_token_loss``). DistributedDataParallel reads that when it is built.
    """
    dtype = PRECISIONS[precision]
    on_gpu = torch.cuda.is_available()
    tp_size = parallel.tensor_model_parallel_size
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return {
        # Weights come from models/weights.py; megatron-core still marks how they are cut.
        "init_method": _leave_empty,
        "output_layer_init_method": _leave_empty,
        "embedding_init_method": _leave_empty,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "tensor_model_parallel_size": tp_size,
        "sequence_parallel": parallel.sequence_parallel and tp_size > 1,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "cp_comm_type": parallel.context_parallel_exchange,
        "hierarchical_context_parallel_sizes": hierarchical_sizes(model, parallel),
        "calculate_per_token_loss": True,
        "num_layers_in_first_pipeline_stage": parallel.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": parallel.num_layers_in_last_pipeline_stage,
        **_recompute_settings(parallel),
        # On a CPU these fusions would call a C++ compiler at the first step.
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        "cross_entropy_loss_fusion": on_gpu,
        "apply_rope_fusion": have_transformer_engine(),
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": have_fused_weight_gradients(),
        # Interleaved stages of two ranks exchange both ways with one peer: batched, the messages
        # would be matched in the wrong order. Overlapped, gloo still reads what the schedule frees.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "deallocate_pipeline_outputs": on_gpu or not interleaved,
        "cuda_graph_scope": [],
    }


def _recompute_settings(parallel: Parallel) -> dict[str, Any]:
    if parallel.recompute_granularity != "full":
        return {
            "recompute_granularity": parallel.recompute_granularity,
            "recompute_modules": parallel.recompute_modules,
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": parallel.recompute_method or "uniform",
        "recompute_num_layers": parallel.recompute_num_layers or 1,
    }


def _leave_empty(weight: torch.Tensor) -> torch.Tensor:
    return weight
