"""One layer of the video transformer: full attention, attention to the text, MLP.

The layers of MUG-V, which are those of PixArt (Chen et al. 2023, arXiv:2310.00426) with normed
queries and keys: the timestep shifts, scales and gates self-attention and MLP; attention to the
text has its own norm and neither gate nor modulation.

Legend: S tokens of this context rank (between the matrices, of this tensor rank), B micro-batch,
L text tokens, N heads, H head dim, D hidden size, R the two rows of ``modulation.py``.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from megatron_curr.models.conditioning import Conditions
from megatron_curr.models.modulation import ScaleShiftTable, gated_sum, modulated_norm
from megatron_curr.models.norms import LayerNorm
from megatron_curr.models.rope3d import rotate


class VideoAttention(SelfAttention):
    """Every token attends to every other, in the places that rotation gives them."""

    def forward(self, hidden_SBD: Tensor, conditions: Conditions) -> Tensor:
        """[S, B, D]; queries and keys are normed before they are rotated."""
        query, key, value = self.get_query_key_value_tensors(hidden_SBD)
        query, key = (rotate(x, conditions.rotation) for x in (query, key))
        attend = partial(self.core_attention, attention_mask=None, num_tokens=conditions.num_tokens)
        if self.checkpoint_core_attention and self.training:
            attended = tensor_parallel.checkpoint(attend, False, query, key, value)
        else:
            attended = attend(query, key, value)
        return _with_bias(self.linear_proj(attended))


@dataclass
class TextAttentionSubmodules(CrossAttentionSubmodules):
    """megatron-core's, with norms of queries and keys."""

    q_layernorm: type | None = None
    k_layernorm: type | None = None


class TextAttention(CrossAttention):
    """Every token attends to the text of its sample, which each context rank holds whole."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TextAttentionSubmodules,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        head_dim, eps = self.hidden_size_per_attention_head, config.layernorm_epsilon
        assert submodules.q_layernorm and submodules.k_layernorm
        self.q_layernorm = submodules.q_layernorm(config=config, hidden_size=head_dim, eps=eps)
        self.k_layernorm = submodules.k_layernorm(config=config, hidden_size=head_dim, eps=eps)

    def forward(self, hidden_SBD: Tensor, conditions: Conditions) -> Tensor:
        """[S, B, D]; what the text's padding holds does not matter."""
        query, key, value = self.get_query_key_value_tensors(hidden_SBD, conditions.text_LBD)
        query, key = self.q_layernorm(query), self.k_layernorm(key)
        attended = self.core_attention(query, key, value, conditions.text_mask_B11L)
        return _with_bias(self.linear_proj(attended))


class TextCoreAttention(MegatronModule):
    """Softmax attention of queries [S, B, N, H] over few keys [L, B, N, H]; no parameters."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask_B11L: Tensor) -> Tensor:
        """[S, B, N*H]; nothing is heard of a text without tokens."""
        q_BNSH, k_BNLH, v_BNLH = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        has_text_B111 = mask_B11L.any(-1, keepdim=True)
        # A softmax over no key has no value: where there is none, take all and drop the result.
        out_BNSH = scaled_dot_product_attention(
            q_BNSH, k_BNLH, v_BNLH, attn_mask=mask_B11L | ~has_text_B111
        )
        return out_BNSH.masked_fill(~has_text_B111, 0).permute(2, 0, 1, 3).flatten(2)


class VideoLayer(TransformerLayer):
    """One layer; megatron-core's, but for how its parts are put together."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.scale_shift_table = ScaleShiftTable(config, 6)

    def forward(self, hidden_SBD: Tensor, conditions: Conditions) -> Tensor:
        """[S, B, D] of this tensor rank's tokens."""
        numbers = self.scale_shift_table(conditions.modulation_RB6D)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = numbers
        norm = partial(
            modulated_norm, noised_SB=conditions.noised_SB, eps=self.config.layernorm_epsilon
        )
        add = partial(gated_sum, noised_SB=conditions.noised_SB)

        branch = norm(hidden_SBD, shift_RBD=shift_attention, scale_RBD=scale_attention)
        branch = self.self_attention(branch, conditions)
        hidden_SBD = add(hidden_SBD, branch, gate_RBD=gate_attention)

        branch = self.pre_cross_attn_layernorm(hidden_SBD)
        hidden_SBD = hidden_SBD + self.cross_attention(branch, conditions)

        branch = norm(hidden_SBD, shift_RBD=shift_mlp, scale_RBD=scale_mlp)
        if self.recompute_mlp and self.training:
            branch = tensor_parallel.checkpoint(self._mlp, False, branch)
        else:
            branch = self._mlp(branch)
        return add(hidden_SBD, branch, gate_RBD=gate_mlp)

    def _mlp(self, x_SBD: Tensor) -> Tensor:
        return _with_bias(self.mlp(x_SBD))


def video_layer_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The layer from the backend's modules. ``backend`` gives our attention core."""
    column, row = backend.column_parallel_linear(), backend.row_parallel_linear()
    query_key_norm = backend.layer_norm(rms_norm=True, for_qk=True)
    full = {"attn_mask_type": AttnMaskType.no_mask}
    return ModuleSpec(
        module=VideoLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=ModuleSpec(
                module=VideoAttention,
                params=full,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=column,
                    core_attention=backend.core_attention(),
                    linear_proj=row,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            pre_cross_attn_layernorm=LayerNorm,
            cross_attention=ModuleSpec(
                module=TextAttention,
                params=full,
                submodules=TextAttentionSubmodules(
                    linear_q=column,
                    linear_kv=partial(_linear_of_whole_text, column),
                    core_attention=TextCoreAttention,
                    linear_proj=row,
                    q_layernorm=query_key_norm,
                    k_layernorm=query_key_norm,
                ),
            ),
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row)),
        ),
    )


def _linear_of_whole_text(
    column: type[nn.Module], *args: Any, config: TransformerConfig, **kwargs: Any
) -> nn.Module:
    """Without sequence parallelism: every tensor rank has all of the text already.

    With it, the text would be gathered once for each tensor rank, all copies alike.
    """
    whole = copy.copy(config)
    whole.sequence_parallel = False
    return column(*args, config=whole, **kwargs)


def _with_bias(output_and_bias: tuple[Tensor, Tensor]) -> Tensor:
    output, bias = output_and_bias
    return output + bias
