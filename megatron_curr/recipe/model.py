"""What is trained: the architecture of a decoder-only transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_curr.recipe.presets import TEXT_PRESETS, architecture_or_preset, model_preset
from megatron_curr.recipe.section import Section, SequenceLength


class Model(Section):
    """A decoder-only transformer, in the terms of megatron-core's ``TransformerConfig``."""

    model_config = ConfigDict(
        json_schema_extra=architecture_or_preset(
            TEXT_PRESETS, has_default={"kv_channels", "num_query_groups"}
        )
    )

    preset: str | None = Field(
        None, description="Named architecture; fields given here override it"
    )
    num_layers: int = Field(gt=0, description="Transformer layers")
    hidden_size: int = Field(gt=0, description="Width of the residual stream")
    ffn_hidden_size: int = Field(gt=0, description="Width of the MLP's hidden layer")
    num_attention_heads: int = Field(gt=0, description="Query heads")
    num_query_groups: int = Field(
        gt=0, description="Key/value heads (GQA); default: num_attention_heads"
    )
    kv_channels: int = Field(gt=0, description="Head dimension; default: hidden_size / heads")
    vocab_size: int | None = Field(None, gt=0, description="Default: the tokenizer's")
    make_vocab_size_divisible_by: int = Field(
        128, gt=0, description="The embedding's rows are padded to a multiple of this and of tp"
    )
    max_position_embeddings: SequenceLength = Field(description="Longest sequence, tokens")
    rotary_base: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies")
    rotary_percent: float = Field(1.0, gt=0, le=1, description="Part of a head that is rotated")
    rotary_interleaved: bool = Field(
        False, description="Rotates neighbours in a head, not one half of it with the other"
    )
    no_rope_freq: Annotated[int, Field(gt=0)] | list[Literal[0, 1]] | None = Field(
        None, description="Every n-th layer rotates nothing; or 1 and 0 for each layer"
    )
    rope_scaling_factor: float | None = Field(
        None,
        gt=1,
        description="Llama 3.1's stretching of slow rotations, from an original length of 8,192 "
        "(low and high frequency factors 1 and 4)",
    )
    seq_len_interpolation_factor: float | None = Field(
        None, gt=1, description="Linear stretching of rotations: positions are divided by it"
    )
    yarn_scaling_factor: float | None = Field(
        None, gt=1, description="YaRN's stretching of rotations (2309.00071); default: none"
    )
    yarn_original_max_position_embeddings: SequenceLength = Field(
        4096, description="Longest sequence before it was stretched, tokens"
    )
    yarn_beta_fast: float = Field(
        32.0, gt=0, description="Rotations in that length from which on a frequency stays as it is"
    )
    yarn_beta_slow: float = Field(
        1.0, gt=0, description="Rotations below which a frequency is stretched in full"
    )
    yarn_mscale: float = Field(
        1.0, ge=0, description="Weight of log(factor) in what queries and keys are multiplied by"
    )
    yarn_mscale_all_dim: float = Field(
        0.0, ge=0, description="The same of what they are divided by; latent: of the softmax scale"
    )
    normalization: Literal["RMSNorm", "LayerNorm"] = Field(
        "RMSNorm", description="Kind of every norm; LayerNorm has a bias"
    )
    layernorm_bias: bool = Field(True, description="Whether LayerNorms have their bias")
    norm_position: Literal["before", "after", "both"] = Field(
        "before", description="Norms of a block's input, of its output before it is added, or both"
    )
    layernorm_zero_centered_gamma: bool = Field(
        False, description="Norms multiply by 1 + weight, which begins as 0"
    )
    layernorm_epsilon: float = Field(1e-5, gt=0, description="Added to a norm's variance")
    activation: Literal["swiglu", "geglu_tanh", "gelu", "gelu_tanh", "squared_relu"] = Field(
        "swiglu", description="The first two are gated: two projections in; the others have one"
    )
    parallel_residual: bool = Field(
        False, description="Attention and MLP both read the layer's input, and are added together"
    )
    shared_residual_norm: bool = Field(
        False, description="Of parallel_residual: one norm of the input for both, not one for each"
    )
    qk_layernorm: bool = Field(False, description="Norms of queries and of keys")
    qk_layernorm_over: Literal["head", "projection"] = Field(
        "head", description="One norm of each head, or one of all heads of a token together"
    )
    add_qkv_bias: bool = Field(False, description="Biases of queries, keys and values alone")
    linear_biases: Literal["none", "into_residual", "all"] = Field(
        "none",
        description="Biases of the linears that write into the residual stream, or of every one",
    )
    untie_embeddings_and_output_weights: bool = Field(
        True, description="The output layer has weights of its own, not the embedding's"
    )
    embedding_multiplier: float = Field(
        1.0, gt=0, description="Embeddings are multiplied by it on their way into the first layer"
    )
    residual_multiplier: float = Field(
        1.0, gt=0, description="What attention and MLP add is multiplied by it"
    )
    window_size: int | None = Field(
        None, gt=0, description="Tokens that a token sees, itself included; default: all before it"
    )
    window_attn_skip_freq: Annotated[int, Field(gt=0)] | list[Literal[0, 1]] | None = Field(
        None,
        description="Every n-th layer has no window; or 0 and 1, which has one, for each layer; "
        "default: all have",
    )
    window_rotary_base: float | None = Field(
        None,
        gt=0,
        description="Layers with a window rotate by this base, and are not stretched; default: as "
        "the others",
    )
    softmax_scale: float | None = Field(
        None, gt=0, description="Scores are multiplied by it; default: 1 / sqrt(kv_channels)"
    )
    logits_scaling: float = Field(1.0, gt=0, description="Logits are divided by it")
    init_method_std: float = Field(
        0.02,
        gt=0,
        description="Standard deviation of first weights; of those that write into "
        "the residual stream, divided by sqrt(2 x num_layers)",
    )

    kv_lora_rank: int | None = Field(
        None, gt=0, description="Makes attention multi-latent: rank of keys and values"
    )
    q_lora_rank: int | None = Field(
        None, gt=0, description="Multi-latent: rank of queries; default: not compressed"
    )
    qk_head_dim: int = Field(128, gt=0, description="Multi-latent: head dim without rotation")
    qk_pos_emb_head_dim: int = Field(64, gt=0, description="Multi-latent: head dim rotated")
    v_head_dim: int = Field(128, gt=0, description="Multi-latent: head dim of values")
    latent_layernorm_epsilon: float | None = Field(
        None, gt=0, description="Multi-latent: of the latent norms; default: layernorm_epsilon"
    )

    num_moe_experts: int | None = Field(None, gt=1, description="Routed experts of a layer")
    moe_ffn_hidden_size: int | None = Field(
        None, gt=0, description="Width of one expert's SwiGLU; default: ffn_hidden_size"
    )
    moe_layer_freq: Annotated[int, Field(gt=0)] | list[Literal[0, 1]] = Field(
        1, description="Every n-th layer has experts, from the first; or 1 and 0 for each layer"
    )
    moe_shared_expert_intermediate_size: int | None = Field(
        None, gt=0, description="Width of the experts that see every token, all together"
    )
    moe_router_topk: int = Field(2, gt=0, description="Experts a token is sent to")
    moe_router_score_function: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="What makes scores of the router's logits"
    )
    moe_router_pre_softmax: bool = Field(
        False, description="Softmax over all experts before the choice, not over the chosen ones"
    )
    moe_router_num_groups: int | None = Field(
        None, gt=0, description="Experts are chosen from some groups of them; default: from all"
    )
    moe_router_group_topk: int | None = Field(
        None, gt=0, description="Groups a token's experts come from"
    )
    moe_router_topk_scaling_factor: float | None = Field(
        None, gt=0, description="Factor of the chosen experts' weights; default: 1"
    )
    moe_aux_loss_coeff: float = Field(
        0.0,
        ge=0,
        description="Weight of the load-balancing loss. It is Megatron's seq_aux_loss, of each "
        "sequence by itself: the others depend on the micro-batch, so on the layout",
    )
    moe_router_enable_expert_bias: bool = Field(
        False, description="Balance by a bias in the choice of experts (needs sigmoid scores)"
    )
    moe_router_bias_update_rate: float = Field(
        1e-3, gt=0, description="How far that bias moves in a step"
    )

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For every layer, whether it has experts."""
        if self.num_moe_experts is None:
            return (False,) * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return tuple(layer % self.moe_layer_freq == 0 for layer in range(self.num_layers))
        return tuple(map(bool, self.moe_layer_freq))

    @property
    def unrotated_layers(self) -> tuple[bool, ...]:
        """For every layer, whether its attention rotates nothing."""
        if isinstance(self.no_rope_freq, list):
            return tuple(map(bool, self.no_rope_freq))
        every = self.no_rope_freq or self.num_layers + 1
        return tuple((layer + 1) % every == 0 for layer in range(self.num_layers))

    @property
    def windowed_layers(self) -> tuple[bool, ...]:
        """For every layer, whether its attention has a window."""
        if self.window_size is None:
            return (False,) * self.num_layers
        if isinstance(self.window_attn_skip_freq, list):
            return tuple(map(bool, self.window_attn_skip_freq))
        every = self.window_attn_skip_freq or self.num_layers + 1
        return tuple((layer + 1) % every != 0 for layer in range(self.num_layers))

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has two projections in, one of which gates the other."""
        return self.activation in ("swiglu", "geglu_tanh")

    @property
    def has_latent_attention(self) -> bool:
        """Whether keys and values come from a compressed vector."""
        return self.kv_lora_rank is not None

    @property
    def expert_ffn_hidden_size(self) -> int:
        """Width of one routed expert."""
        return self.moe_ffn_hidden_size or self.ffn_hidden_size

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if isinstance(values.get("preset"), str):
            try:
                filled = {**model_preset(values["preset"]), **values}
            except ValueError as unknown:  # its own type lets the loader name the line of `preset`
                raise PydanticCustomError("unknown_preset", "{m}", {"m": str(unknown)}) from None
        hidden_size, heads = filled.get("hidden_size"), filled.get("num_attention_heads")
        if isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0:
            filled.setdefault("kv_channels", hidden_size // heads)
            filled.setdefault("num_query_groups", heads)
        return filled
