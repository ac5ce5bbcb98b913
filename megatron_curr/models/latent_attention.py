"""Multi-latent attention: keys and values from a compressed vector (DeepSeek-V2, 2405.04434).

megatron-core's class, with down-projections that every tensor rank holds whole. Its local spec cuts
them and gathers the result, which leaves the gradient of the shared rotated key unsummed over the
ranks; its Transformer Engine spec holds them whole, as here. The rotated key's gradient is summed
where the sequence is gathered, so tensor parallelism needs sequence parallelism.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from torch import Tensor, nn

if TYPE_CHECKING:
    from megatron_curr.recipe.model import Model


class WholeLinear(nn.Module):
    """A linear without bias that every tensor rank holds whole; returns (output, no bias)."""

    def __init__(self, config: TransformerConfig, input_size: int, output_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(
                output_size,
                input_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        # Each rank sees a part of the tokens: finalize_model_grads sums the gradient.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``x`` [S, B, input] to [S, B, output]."""
        return nn.functional.linear(x, self.weight), None


class LatentAttention(MLASelfAttention):
    """megatron-core's multi-latent attention with whole down-projections."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if config.q_lora_rank is not None:
            self.linear_q_down_proj = WholeLinear(config, config.hidden_size, config.q_lora_rank)
        self.linear_kv_down_proj = WholeLinear(
            config, config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim
        )


@cache
def _with_epsilon(norm: type, epsilon: float) -> type:
    class NormOfEpsilon(norm):
        """The norm with an epsilon of its own, whatever the model's other norms have."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "eps": epsilon})

    return NormOfEpsilon


def latent_attention(backend: BackendSpecProvider, model: Model) -> ModuleSpec:
    """Latent attention of the backend's modules, its norms apart from the linears."""
    column, norm = backend.column_parallel_linear(), backend.layer_norm(rms_norm=True)
    if model.latent_layernorm_epsilon is not None:
        norm = _with_epsilon(norm, model.latent_layernorm_epsilon)
    return ModuleSpec(
        module=LatentAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=MLASelfAttentionSubmodules(
            linear_q_proj=column,
            linear_q_down_proj=column,
            linear_q_up_proj=column,
            linear_kv_down_proj=column,
            linear_kv_up_proj=column,
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=norm,
            kv_layernorm=norm,
        ),
    )


def latent_settings(model: Model) -> dict[str, Any]:
    """What ``MLATransformerConfig`` is told; nothing for plain attention."""
    if not model.has_latent_attention:
        return {}
    stretched = model.yarn_scaling_factor is not None
    settings: dict[str, Any] = {
        "q_lora_rank": model.q_lora_rank,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_head_dim": model.qk_head_dim,
        "qk_pos_emb_head_dim": model.qk_pos_emb_head_dim,
        "v_head_dim": model.v_head_dim,
        "rotary_base": model.rotary_base,
        "rope_type": "yarn" if stretched else "rope",
        "apply_rope_fusion": False,
    }
    if stretched:
        settings |= {
            "rotary_scaling_factor": model.yarn_scaling_factor,
            "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
            "beta_fast": model.yarn_beta_fast,
            "beta_slow": model.yarn_beta_slow,
            "mscale": model.yarn_mscale,
            "mscale_all_dim": model.yarn_mscale_all_dim,
        }
    return settings
