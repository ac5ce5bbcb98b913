"""What a rank keeps of one micro-batch between its forward and its backward pass.

Counted tensor by tensor, as autograd saves them; the tests compare with what it really saves in the
modules of ``models/`` on a CPU. With Transformer Engine (``is_fused``) norms and activation
functions save their inputs only, which leaves, for a dense layer of bf16 with sequence parallelism,
``2 tokens / TP x (4 hidden + 3 query + 3 key + 3 ffn)`` bytes: the count of Korthikanti et al.
2022 (arXiv:2205.05198, section 4) for SwiGLU and flash attention (Dao et al. 2022,
arXiv:2205.14135), which keeps no scores. The local modules keep more: fp32 copies in norms, and
both factors of SwiGLU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.video_model import VideoDiT


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a data-parallel rank, and how it is computed."""

    model: Model | VideoDiT
    parallel: Parallel
    vocab_size: int  # padded; 0 for video
    num_samples: int
    seq_length: int  # of a sample, whole
    precision: str  # bf16 or fp32
    is_fused: bool  # Transformer Engine's modules, not the local ones
    isolate_documents: bool
    keeps_average: bool = False  # of the weights, beside Adam's moments

    @cached_property
    def element_bytes(self) -> int:
        """Of a number in the model's precision."""
        return 2 if self.precision == "bf16" else 4

    @cached_property
    def tp_size(self) -> int:
        return self.parallel.tensor_model_parallel_size

    @cached_property
    def tokens(self) -> int:
        """Of this rank's part of the sequences."""
        return self.num_samples * self.seq_length // self.parallel.context_parallel_size

    @cached_property
    def sharded_tokens(self) -> int:
        """Of those, what it holds between the matrices."""
        return self.tokens // self.tp_size if self.parallel.sequence_parallel else self.tokens

    @cached_property
    def text(self) -> Model:
        """The model, for what only language models have."""
        assert isinstance(self.model, Model)
        return self.model

    @cached_property
    def query_width(self) -> int:
        """Of the queries of this rank's heads."""
        model = self.model
        if isinstance(model, Model) and model.has_latent_attention:
            per_head = model.qk_head_dim + model.qk_pos_emb_head_dim
        else:
            per_head = model.kv_channels
        return model.num_attention_heads * per_head // self.tp_size

    @cached_property
    def key_value_width(self) -> int:
        """Of its keys and values together, as attention reads them."""
        model = self.model
        if isinstance(model, Model) and model.has_latent_attention:
            return self.query_width + model.num_attention_heads * model.v_head_dim // self.tp_size
        return 2 * model.num_query_groups * model.kv_channels // self.tp_size

    def has_experts(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts."""
        return isinstance(self.model, Model) and self.model.moe_layers[layer]

    @cached_property
    def routed_tokens(self) -> int:
        """Rows that its experts see, where all experts are chosen equally often."""
        return self.sharded_tokens * self.text.moe_router_topk * self.parallel.expert_tp_size

    def recomputes(self, module: str) -> bool:
        """Whether this module of every layer is computed again instead of kept."""
        parallel = self.parallel
        chosen = parallel.recompute_modules or ["core_attn"]
        return parallel.recompute_granularity == "selective" and module in chosen


def layer_bytes(batch: MicroBatch, *, has_experts: bool) -> int:
    """Kept of one layer that is not recomputed as a whole."""
    hidden_bytes = batch.sharded_tokens * batch.model.hidden_size * batch.element_bytes
    mlp = _experts_bytes(batch) if has_experts else _mlp_bytes(batch)
    latent = batch.text.has_latent_attention
    attention = _latent_attention_bytes(batch) if latent else _attention_bytes(batch)
    norms = 4 if batch.text.norm_position == "both" else 2
    return norms * _residual_norm_bytes(batch) + 2 * hidden_bytes + attention + mlp


def checkpoint_bytes(batch: MicroBatch) -> int:
    """Kept of a unit of layers that is recomputed as a whole: its input."""
    return batch.sharded_tokens * batch.model.hidden_size * batch.element_bytes


def embedding_bytes(batch: MicroBatch) -> int:
    """Kept of the lookup in front of the first layer: ids, and which of them are other ranks'."""
    return batch.tokens * (8 + (batch.tp_size > 1))


def loss_bytes(batch: MicroBatch) -> int:
    """Kept behind the last layer: its norm, the output layer's input, the fp32 softmax."""
    hidden = batch.model.hidden_size
    logits = 4 * batch.tokens * batch.vocab_size // batch.tp_size
    targets = (8 + 1) * batch.tokens
    norm = _residual_norm_bytes(batch)
    return norm + batch.sharded_tokens * hidden * batch.element_bytes + logits + targets


def norm_bytes(batch: MicroBatch, rows: int, width: int) -> int:
    """Of ``rows`` x ``width``: its input, or that in fp32 and once more normalised, and 1 / rms."""
    per_number = batch.element_bytes if batch.is_fused else 4 + 4
    return rows * (width * per_number + 4)


def _residual_norm_bytes(batch: MicroBatch) -> int:
    """Of a norm of hidden states; the local LayerNorm keeps its input alone, in fp32."""
    rows, width = batch.sharded_tokens, batch.model.hidden_size
    if batch.text.normalization == "LayerNorm" and not batch.is_fused:
        return rows * (width * 4 + 8)
    return norm_bytes(batch, rows, width)


def _attention_bytes(batch: MicroBatch) -> int:
    """Between the projection of queries, keys and values and the one behind the heads.

    Rotated queries and keys are kept beside the projection's output, which lives on as the values
    are a part of it; where keys and values travel together, or documents are isolated, they are
    copied, and the output goes.
    """
    model, parallel = batch.text, batch.parallel
    size, tokens = batch.element_bytes, batch.tokens
    heads, groups = (
        model.num_attention_heads // batch.tp_size,
        model.num_query_groups // batch.tp_size,
    )
    query, key = heads * model.kv_channels, groups * model.kv_channels
    log_sums = 4 * tokens * heads
    exchanges = parallel.context_parallel_size > 1
    if batch.recomputes("core_attn"):
        kept = tokens * size * (3 * query + 3 * key)
    elif exchanges or batch.isolate_documents or (model.window_size and not batch.is_fused):
        by_heads = exchanges and parallel.context_parallel_exchange in ("a2a", "a2a+p2p")
        kept = tokens * size * ((3 if by_heads else 2) * query + 2 * key) + log_sums
    else:
        kept = tokens * size * (3 * query + 3 * key) + log_sums
    if model.qk_layernorm:
        kept += norm_bytes(batch, tokens * heads, model.kv_channels)
        kept += norm_bytes(batch, tokens * groups, model.kv_channels)
    if not batch.is_fused:  # cosines and sines, for queries and for keys
        length = batch.seq_length // parallel.context_parallel_size
        kept += 4 * length * model.kv_channels * size
    return kept


def _latent_attention_bytes(batch: MicroBatch) -> int:
    """Multi-latent attention: compressed vectors and their norms, then whole heads side by side."""
    model, tokens, size = batch.text, batch.tokens, batch.element_bytes
    heads = model.num_attention_heads // batch.tp_size
    ranks = [rank for rank in (model.q_lora_rank, model.kv_lora_rank) if rank]
    kept = sum(norm_bytes(batch, batch.sharded_tokens, rank) for rank in ranks)
    kept += batch.sharded_tokens * size * sum(ranks)
    key = heads * (model.qk_head_dim + model.qk_pos_emb_head_dim)
    kept += tokens * size * (2 * key + 2 * heads * model.v_head_dim)
    return kept if batch.recomputes("core_attn") else kept + 4 * tokens * heads


def _mlp_bytes(batch: MicroBatch) -> int:
    if batch.recomputes("mlp"):
        return 0
    width = batch.model.ffn_hidden_size // batch.tp_size
    return batch.tokens * width * batch.element_bytes * _widths_kept(batch)


def _widths_kept(batch: MicroBatch) -> int:
    """Of gate and up together, what is multiplied, and the input of the way down, in widths."""
    if not batch.text.is_gated:
        return 2
    return 3 if batch.is_fused else 5


def _experts_bytes(batch: MicroBatch) -> int:
    """Router, routed and shared experts."""
    model = batch.text
    if batch.recomputes("moe"):
        return 0
    assert model.num_moe_experts is not None
    chosen, width = model.moe_router_topk, model.expert_ffn_hidden_size
    # Per token: scores, their softmax, what was chosen, and the order to send it in.
    routing = batch.sharded_tokens * (28 * chosen + 9 * model.num_moe_experts)
    widths = width // batch.parallel.expert_tp_size * (_widths_kept(batch) + (not batch.is_fused))
    kept = routing + batch.routed_tokens * (batch.element_bytes * (model.hidden_size + widths) + 4)
    if model.moe_shared_expert_intermediate_size and not batch.recomputes("shared_experts"):
        shared = model.moe_shared_expert_intermediate_size // batch.tp_size
        kept += batch.tokens * shared * batch.element_bytes * _widths_kept(batch)
    return kept
