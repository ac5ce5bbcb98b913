"""How one model is split over ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_curr.recipe.section import PositiveTokens, Section

ContextParallelExchange = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
"""As megatron-core's ``cp_comm_type``."""


class Parallel(Section):
    """How one model is split. The sample order and the result do not depend on it."""

    tensor_model_parallel_size: int = Field(1, gt=0, description="Ranks that cut every layer (tp)")
    sequence_parallel: bool = Field(
        False, description="Between cut layers, cut the sequence over the tensor-parallel ranks"
    )
    pipeline_model_parallel_size: int = Field(
        1, gt=0, description="Stages that the layers are shared out among (pp)"
    )
    virtual_pipeline_model_parallel_size: int | None = Field(
        None, gt=1, description="Chunks of layers of a stage, interleaved; default: one"
    )
    num_layers_in_first_pipeline_stage: int | None = Field(
        None, gt=0, description="Default: the layers are spread evenly"
    )
    num_layers_in_last_pipeline_stage: int | None = Field(
        None, gt=0, description="Default: the layers are spread evenly"
    )
    context_parallel_size: int = Field(
        1, gt=0, description="Ranks that cut every sequence, attention included (cp)"
    )
    context_parallel_exchange: ContextParallelExchange = Field(
        "p2p",
        description="How attention reaches the keys of other context ranks: a ring (p2p), all at "
        "once (all_gather), by heads (a2a), by heads among neighbours and a ring across (a2a+p2p)",
    )
    hierarchical_context_parallel_sizes: list[Annotated[int, Field(gt=1)]] | None = Field(
        None,
        min_length=2,
        max_length=2,
        description="For a2a+p2p: ranks of an all-to-all, and of a ring; default: the largest "
        "all-to-all that divides the heads",
    )
    expert_model_parallel_size: int = Field(
        1, gt=0, description="Ranks that share the experts out; taken from data and context ranks"
    )
    expert_tensor_parallel_size: int | None = Field(
        None, gt=0, description="Ranks that cut one expert; default: tensor_model_parallel_size"
    )
    use_distributed_optimizer: bool = Field(
        False, description="Share moments and fp32 weights out among the data-parallel ranks"
    )
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients bucket by bucket while the backward pass still runs"
    )
    overlap_param_gather: bool = Field(
        False, description="Gather updated weights bucket by bucket while the next forward runs"
    )
    micro_batch_tokens: PositiveTokens = Field(
        description="Tokens per micro-batch of a data-parallel rank; a multiple of every seq_length"
    )
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None, description="Activations computed again in the backward pass; default: none"
    )
    recompute_method: Literal["uniform", "block"] | None = Field(
        None, description="For full recompute; default: uniform"
    )
    recompute_num_layers: int | None = Field(
        None, gt=0, description="Layers of a unit (uniform) or of a stage (block); default: 1"
    )
    recompute_modules: list[Literal["core_attn", "mlp", "moe", "shared_experts"]] | None = Field(
        None, min_length=1, description="For selective recompute; default: core_attn"
    )

    @property
    def expert_tp_size(self) -> int:
        """Ranks that cut one expert."""
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size
