"""What is trained: the architecture of a decoder-only transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_curr.recipe.presets import model_preset
from megatron_curr.recipe.section import Section


def _architecture_or_preset(schema: dict[str, Any]) -> None:
    """In the JSON schema: a model gives its preset or its own architecture."""
    required = set(schema.pop("required")) - {"kv_channels", "num_query_groups"}  # have defaults
    schema["anyOf"] = [{"required": ["preset"]}, {"required": sorted(required)}]


class Model(Section):
    """A decoder-only transformer, in the terms of megatron-core's ``TransformerConfig``."""

    model_config = ConfigDict(json_schema_extra=_architecture_or_preset)

    preset: str | None = Field(
        None, description="Named architecture; fields given here override it"
    )
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    ffn_hidden_size: int = Field(gt=0, description="Width of the MLP's hidden layer")
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0, description="Key/value heads (GQA)")
    kv_channels: int = Field(gt=0, description="Head dimension")
    vocab_size: int | None = Field(None, gt=0, description="Default: the tokenizer's")
    make_vocab_size_divisible_by: int = Field(128, gt=0)
    max_position_embeddings: int = Field(gt=0, description="Longest sequence, tokens")
    rotary_base: float = Field(10_000.0, gt=0)
    rotary_percent: float = Field(1.0, gt=0, le=1, description="Part of a head that is rotated")
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
    yarn_original_max_position_embeddings: int = Field(
        4096, gt=0, description="Longest sequence before it was stretched, tokens"
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
    normalization: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    norm_position: Literal["before", "after"] = Field(
        "before", description="Norms of a block's input, or of its output before it is added"
    )
    layernorm_epsilon: float = Field(1e-5, gt=0)
    activation: Literal["swiglu", "gelu"] = Field(
        "swiglu", description="SwiGLU is gated: two projections in; gelu has one"
    )
    parallel_residual: bool = Field(
        False, description="Attention and MLP both read the layer's input, and are added together"
    )
    qk_layernorm: bool = Field(False, description="Norms of queries and of keys")
    qk_layernorm_over: Literal["head", "projection"] = Field(
        "head", description="One norm of each head, or one of all heads of a token together"
    )
    add_qkv_bias: bool = False
    linear_biases: Literal["none", "into_residual", "all"] = Field(
        "none",
        description="Biases of the linears that write into the residual stream, or of every one",
    )
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = Field(0.02, gt=0)

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
    moe_router_score_function: Literal["softmax", "sigmoid"] = "softmax"
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
    moe_router_bias_update_rate: float = Field(1e-3, gt=0)

    @property
    def moe_layers(self) -> tuple[bool, ...]:
        """For every layer, whether it has experts."""
        if self.num_moe_experts is None:
            return (False,) * self.num_layers
        if isinstance(self.moe_layer_freq, int):
            return tuple(layer % self.moe_layer_freq == 0 for layer in range(self.num_layers))
        return tuple(map(bool, self.moe_layer_freq))

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
