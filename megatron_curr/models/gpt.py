"""A decoder-only transformer as megatron-core's GPTModel, through our choice of modules.

RoPE, RMSNorm, SwiGLU, grouped queries, tied or untied embeddings, optional norms of queries and
keys, biases of the fused query-key-value projection and experts: Llama, Qwen and Mixtral are
settings of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_curr.models.backend import (
    choose_backend,
    have_fused_weight_gradients,
    have_transformer_engine,
)
from megatron_curr.models.experts import expert_layer, expert_settings, mark_expert_parameters
from megatron_curr.models.weights import initialise_weights
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.context_rules import hierarchical_sizes

if TYPE_CHECKING:
    from megatron_curr.recipe.model import Model
    from megatron_curr.recipe.parallel import Parallel

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def padded_vocab_size(vocab_size: int, model: Model, *, tp_size: int) -> int:
    """Rows of the embedding and output matrices.

    The least multiple of ``model.make_vocab_size_divisible_by`` that TP divides. It is the same for
    every TP that divides that setting, so checkpoints of those layouts have one shape; Megatron
    pads to a multiple of the setting times TP, which ties the shape to the layout.
    """
    multiple = math.lcm(model.make_vocab_size_divisible_by, tp_size)
    return -(-vocab_size // multiple) * multiple


def transformer_config(model: Model, *, parallel: Parallel, precision: str) -> TransformerConfig:
    """megatron-core's configuration of the model; ``precision`` is ``fp32`` or ``bf16``.

    Losses are summed, and gradients divided by the global count of unmasked tokens at the end of
    the step (``calculate_per_token_loss``). DistributedDataParallel reads that when it is built.
    """
    dtype = PRECISIONS[precision]
    on_gpu = torch.cuda.is_available()
    tp_size = parallel.tensor_model_parallel_size
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        qk_layernorm=model.qk_layernorm,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Weights come from models/weights.py; megatron-core still marks how they are cut.
        init_method=_leave_empty,
        output_layer_init_method=_leave_empty,
        embedding_init_method=_leave_empty,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=tp_size,
        sequence_parallel=parallel.sequence_parallel and tp_size > 1,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.context_parallel_exchange,
        hierarchical_context_parallel_sizes=hierarchical_sizes(model, parallel),
        calculate_per_token_loss=True,
        num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
        num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
        **_recompute_settings(parallel),
        **expert_settings(model, parallel=parallel),
        # On a CPU these fusions would call a C++ compiler at the first step.
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        cross_entropy_loss_fusion=on_gpu,
        apply_rope_fusion=have_transformer_engine(),
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=have_fused_weight_gradients(),
        # Interleaved stages of two ranks exchange both ways with one peer: batched, the messages
        # would be matched in the wrong order. Overlapped, gloo still reads what the schedule frees.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=on_gpu or not interleaved,
        cuda_graph_scope=[],
    )


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


def layer_spec(
    backend: BackendSpecProvider, *, qk_layernorm: bool, has_experts: bool = False
) -> ModuleSpec:
    """One transformer layer from the backend's modules; norms may be fused into linears."""
    fused_norm = backend.column_parallel_layer_norm_linear()
    into_layer = fused_norm or backend.column_parallel_linear()
    own_norm = backend.layer_norm(rms_norm=True)
    norm = IdentityOp if fused_norm else own_norm
    query_key_norm = backend.layer_norm(rms_norm=True, for_qk=True) if qk_layernorm else IdentityOp
    # Fused or not, checkpoints name the norms by the linear that follows them.
    checkpoint_names = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if not has_experts:
        checkpoint_names["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    dense = ModuleSpec(
        module=MLP,
        submodules=MLPSubmodules(linear_fc1=into_layer, linear_fc2=backend.row_parallel_linear()),
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=into_layer,
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            # The router and every expert read the norm's output: it is never fused.
            pre_mlp_layernorm=own_norm if has_experts else norm,
            mlp=expert_layer(backend) if has_experts else dense,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={} if fused_norm else checkpoint_names,
        ),
    )


def build_gpt(
    model: Model,
    *,
    parallel: Parallel,
    precision: str,
    groups: Groups,
    vocab_size: int,
    isolate_documents: bool,
    seed: int = 1234,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's stage (``vp_stage`` of the interleaved ones) of the model, with first weights.

    ``vocab_size`` is the tokenizer's; it is padded here. With ``isolate_documents`` the
    ``attention_mask`` argument of ``forward`` may carry int64 document ids [B, S] of the whole
    sequence. The weights depend on ``seed`` alone, not on the layout.
    """
    config = transformer_config(model, parallel=parallel, precision=precision)
    backend = choose_backend(isolate_documents=isolate_documents)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
    block = TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(backend, qk_layernorm=model.qk_layernorm, has_experts=has_experts)
            for has_experts in model.moe_layers[first : first + num_layers]
        ],
        layer_norm=backend.layer_norm(rms_norm=True),
    )
    num_chunks = parallel.virtual_pipeline_model_parallel_size or 1
    gpt = GPTModel(
        config,
        transformer_layer_spec=block,
        vocab_size=padded_vocab_size(vocab_size, model, tp_size=groups.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=groups.pp_rank == 0 and not vp_stage,
        post_process=groups.pp_rank == groups.pp_size - 1 and vp_stage in (None, num_chunks - 1),
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        pg_collection=groups.pg_collection,
        vp_stage=vp_stage,
    )
    mark_expert_parameters(gpt, tp_size=groups.tp_size, etp_size=groups.etp_size)
    initialise_weights(
        gpt, groups=groups, seed=seed, std=model.init_method_std, num_layers=model.num_layers
    )
    return gpt


def build_gpt_chunks(
    model: Model,
    *,
    parallel: Parallel,
    precision: str,
    groups: Groups,
    vocab_size: int,
    isolate_documents: bool,
    seed: int = 1234,
) -> list[GPTModel]:
    """Every chunk this rank holds: one, or as many as there are virtual pipeline stages."""
    num_stages = parallel.virtual_pipeline_model_parallel_size
    return [
        build_gpt(
            model,
            parallel=parallel,
            precision=precision,
            groups=groups,
            vocab_size=vocab_size,
            isolate_documents=isolate_documents,
            seed=seed,
            vp_stage=vp_stage,
        )
        for vp_stage in ([None] if num_stages is None else range(num_stages))
    ]


def _leave_empty(weight: torch.Tensor) -> torch.Tensor:
    return weight
