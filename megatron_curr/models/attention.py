"""The core of attention where Transformer Engine is missing, or documents are isolated.

megatron-core's own local core refuses context parallelism, repeats keys and values for every query
head, and wants a dense mask. This one takes its place in the spec with the same constructor and
call, on torch's fused attention.

Rotary positions need no reset at a document's edge: the score of two tokens depends on the distance
between them, which within a document is the same whatever the document's offset in the window.

Legend: S sequence, B micro-batch, N query heads, G key/value heads, H head dim; suffixes are
logical (a rank holds its part of N and G over tensor parallelism, of S over context parallelism).
"""

from __future__ import annotations

import math

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from megatron_curr.parallel.context_attention import attention
from megatron_curr.parallel.context_exchange import (
    ContextExchange,
    build_exchange,
    build_hierarchical_groups,
)

_MASKS = {AttnMaskType.causal: True, AttnMaskType.no_mask: False}


class CoreAttention(MegatronModule):
    """Scores, softmax and weighted sum of one layer; no parameters.

    ``attention_mask`` of the call is None or int64 document ids [B, S] of the WHOLE sequence, also
    under context parallelism: a token sees only its own document.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert dropout == 0.0, "attention dropout is not offered: pretraining does without"
        assert not config.apply_query_key_layer_scaling and config.softmax_type == "vanilla"
        self.attn_mask_type = attn_mask_type
        is_windowed = is_layer_window_attention(
            config.window_size, config.window_attn_skip_freq, layer_number
        )
        self.window = config.window_size[0] + 1 if is_windowed else None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.exchange = _exchange(config, cp_comm_type, pg_collection)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """Attention of ``query`` [S, B, N, H] over ``key``, ``value`` [S, B, G, H]: [S, B, N*H].

        With ``num_tokens``, for full attention: what comes after them in the whole sequence is
        padding, and nothing attends to it.
        """
        assert attention_bias is None and packed_seq_params is None
        out_SBNH = attention(
            query,
            key,
            value,
            softmax_scale=self.softmax_scale,
            document_ids_BS=attention_mask,
            num_tokens=num_tokens,
            is_causal=_MASKS[attn_mask_type or self.attn_mask_type],
            window=self.window,
            exchange=self.exchange,
        )
        return out_SBNH.reshape(*out_SBNH.shape[:2], -1)


def _exchange(
    config: TransformerConfig, cp_comm_type: str | None, groups: ProcessGroupCollection | None
) -> ContextExchange | None:
    """None on one rank. Without a name it is the ring, as in Transformer Engine."""
    if config.context_parallel_size == 1 or groups is None:
        return None
    levels = None
    if cp_comm_type == "a2a+p2p":
        all_to_all_size, ring_size = config.hierarchical_context_parallel_sizes
        # Groups that megatron-core was not asked for are made here, once for all layers.
        levels = getattr(groups, "hcp", None) or build_hierarchical_groups(
            groups.cp, (all_to_all_size, ring_size)
        )
    return build_exchange(cp_comm_type or "p2p", groups.cp, hierarchical_groups=levels)
