"""A decoder-only transformer as megatron-core's GPTModel, through our choice of modules.

RoPE, grouped or latent queries, tied or untied embeddings, experts: Llama, Qwen, Mixtral, OLMo 2,
GPT-NeoX and DeepSeek V3 are settings of it. ``layer.py`` makes the layers.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_curr.models.backend import choose_backend
from megatron_curr.models.experts import expert_settings, mark_expert_parameters
from megatron_curr.models.latent_attention import latent_settings
from megatron_curr.models.layer import activation, layer_spec, residual_norm
from megatron_curr.models.layout_settings import layout_settings
from megatron_curr.models.weights import initialise_weights, matrix_spread
from megatron_curr.parallel.groups import Groups

if TYPE_CHECKING:
    from megatron_curr.recipe.model import Model
    from megatron_curr.recipe.parallel import Parallel


def padded_vocab_size(vocab_size: int, model: Model, *, tp_size: int) -> int:
    """Rows of the embedding and output matrices.

    The least multiple of ``model.make_vocab_size_divisible_by`` that TP divides. It is the same for
    every TP that divides that setting, so checkpoints of those layouts have one shape; Megatron
    pads to a multiple of the setting times TP, which ties the shape to the layout.
    """
    multiple = math.lcm(model.make_vocab_size_divisible_by, tp_size)
    return -(-vocab_size // multiple) * multiple


def transformer_config(model: Model, *, parallel: Parallel, precision: str) -> TransformerConfig:
    """megatron-core's configuration of the model; ``precision`` is ``fp32`` or ``bf16``."""
    kind = MLATransformerConfig if model.has_latent_attention else TransformerConfig
    settings = layout_settings(model, parallel=parallel, precision=precision)
    settings |= {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "normalization": model.normalization,
        "layernorm_epsilon": model.layernorm_epsilon,
        "layernorm_zero_centered_gamma": model.layernorm_zero_centered_gamma,
        "rotary_interleaved": model.rotary_interleaved,
        "softmax_scale": model.softmax_scale,
        **_windows(model),
        "no_rope_freq": [*map(int, model.unrotated_layers)] if model.no_rope_freq else None,
        # megatron-core sums gradients of these norms over tensor ranks; ours over all heads is cut.
        "qk_layernorm": model.qk_layernorm and model.qk_layernorm_over == "head",
        "add_bias_linear": model.linear_biases == "all",
        "add_qkv_bias": model.add_qkv_bias,
        **expert_settings(model, parallel=parallel),
        **activation(model),
        **latent_settings(model),
    }
    config = kind(**settings)
    if model.yarn_scaling_factor is not None and not model.has_latent_attention:
        _set_yarn(config, model)
    return config


def _windows(model: Model) -> dict[str, Any]:
    if model.window_size is None:
        return {}
    return {
        "window_size": (model.window_size - 1, 0),  # keys on either side of a query's own
        "window_attn_skip_freq": [*map(int, model.windowed_layers)],
    }


def _set_yarn(config: TransformerConfig, model: Model) -> None:
    """Attributes that megatron-core's YaRN of plain attention looks for; no fields of the class."""
    config.position_embedding_type = "yarn"
    config.yarn_rotary_scaling_factor = model.yarn_scaling_factor
    config.yarn_original_max_position_embeddings = model.yarn_original_max_position_embeddings
    config.yarn_beta_fast, config.yarn_beta_slow = model.yarn_beta_fast, model.yarn_beta_slow
    config.yarn_mscale, config.yarn_mscale_all_dim = model.yarn_mscale, model.yarn_mscale_all_dim
    config.yarn_correction_range_round_to_int = True


def build_gpt(
    model: Model,
    *,
    parallel: Parallel,
    precision: str,
    groups: Groups,
    vocab_size: int,
    isolate_documents: bool,
    seed: int | None = 1234,
    vp_stage: int | None = None,
) -> GPTModel:
    """This rank's stage (``vp_stage`` of the interleaved ones) of the model, with first weights.

    ``vocab_size`` is the tokenizer's; it is padded here. With ``isolate_documents`` the
    ``attention_mask`` argument of ``forward`` may carry int64 document ids [B, S] of the whole
    sequence. The weights depend on ``seed`` alone, not on the layout; None leaves them unset.
    """
    config = transformer_config(model, parallel=parallel, precision=precision)
    backend = choose_backend(isolate_documents=isolate_documents)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=groups.pp_rank)
    block = TransformerBlockSubmodules(
        layer_specs=[
            layer_spec(
                backend,
                model,
                has_experts=model.moe_layers[layer],
                is_windowed=model.windowed_layers[layer],
            )
            for layer in range(first, first + num_layers)
        ],
        layer_norm=residual_norm(backend, model),
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
        rotary_percent=model.rotary_percent,
        rope_scaling=model.rope_scaling_factor is not None,
        rope_scaling_factor=model.rope_scaling_factor or 1.0,
        seq_len_interpolation_factor=model.seq_len_interpolation_factor,
        pg_collection=groups.pg_collection,
        vp_stage=vp_stage,
    )
    _multiply(gpt, model)
    mark_expert_parameters(gpt, tp_size=groups.tp_size, etp_size=groups.etp_size)
    if seed is not None:
        spread = partial(matrix_spread, std=model.init_method_std, num_layers=model.num_layers)
        gain = 0.0 if model.layernorm_zero_centered_gamma else 1.0
        initialise_weights(gpt, groups=groups, seed=seed, spread=spread, gain=gain)
    return gpt


def _multiply(gpt: GPTModel, model: Model) -> None:
    """The factors of embeddings and of logits, which megatron-core's model has no place for."""
    if gpt.pre_process and (factor := model.embedding_multiplier) != 1.0:
        gpt.embedding.register_forward_hook(lambda module, inputs, out: out * factor)
    if gpt.post_process and (divisor := model.logits_scaling) != 1.0:
        gpt.output_layer.register_forward_hook(
            lambda module, inputs, out: (out[0] / divisor, *out[1:])
        )


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
