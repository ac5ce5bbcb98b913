"""The recipe: every setting of a run, typed, frozen and checked where it is born.

Field names are Megatron's where Megatron has one. Sizes may be written ``400k``, ``1.5T``.
Cross-section rules live in ``check.py``; reading YAML and naming lines in ``load.py``.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_curr.recipe.presets import model_preset
from megatron_curr.units import parse_count

DEFAULT_WEIGHT_DECAY = 0.1
NAME_PATTERN = r"^[A-Za-z0-9_.-]+$"
_COUNT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^[0-9][0-9_]*(\.[0-9]+)?\s*[kKMBT]?$"},
    ],
    "description": "A count: 4096, 400k, 1.5T",
}

PositiveTokens = Annotated[
    int, BeforeValidator(parse_count), Field(gt=0), WithJsonSchema(_COUNT_SCHEMA)
]
Shape = Literal["linear", "cosine", "step"]


class Section(BaseModel):
    """Frozen, deaf to no unknown key, and strict: ``true`` is no number, ``"4"`` no count."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, strict=True, allow_inf_nan=False
    )


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
    ffn_hidden_size: int = Field(gt=0, description="Width of the SwiGLU hidden layer")
    num_attention_heads: int = Field(gt=0)
    num_query_groups: int = Field(gt=0, description="Key/value heads (GQA)")
    kv_channels: int = Field(gt=0, description="Head dimension")
    vocab_size: int | None = Field(None, gt=0, description="Default: the tokenizer's")
    make_vocab_size_divisible_by: int = Field(128, gt=0)
    max_position_embeddings: int = Field(gt=0, description="Longest sequence, tokens")
    rotary_base: float = Field(10_000.0, gt=0)
    layernorm_epsilon: float = Field(1e-5, gt=0)
    qk_layernorm: bool = False
    add_qkv_bias: bool = False
    untie_embeddings_and_output_weights: bool = True
    init_method_std: float = Field(0.02, gt=0)

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


class Source(Section):
    """One named part of the mixture: one or more indexed shards."""

    shards: str = Field(description="Folder, glob or prefix of .bin/.idx shards")
    heldout: str | None = Field(None, description="Shards evaluated on, never trained on")
    max_epochs: float = Field(4.0, gt=0, description="Most passes over the source in the whole run")
    on_exhausted: Literal["error", "stop", "reweight"] = "error"


class Data(Section):
    tokenizer: str = Field(description="SentencePiece .model or a Hugging Face tokenizer folder")
    sources: dict[Annotated[str, Field(pattern=NAME_PATTERN)], Source] = Field(min_length=1)
    isolate_documents: bool = Field(
        False, description="Attention does not cross document boundaries inside a window"
    )
    chunk_tokens: PositiveTokens | None = Field(
        None,
        description="Unit in which a source is shuffled; a multiple of every seq_length. Default: "
        "the longest one. Set it higher to leave room for a longer phase that an amendment adds",
    )


class Piece(Section):
    """A stretch of a curve: from one value to another over some tokens, then hold."""

    from_: float | None = Field(None, alias="from", description="Default: where the curve stands")
    to: float
    shape: Shape = "linear"
    over: PositiveTokens | None = Field(None, description="Default: the rest of the phase")


class BatchPiece(Section):
    """A stretch of the global-batch curve, climbing in whole increments."""

    from_: PositiveTokens | None = Field(None, alias="from")
    to: PositiveTokens
    increment: PositiveTokens
    shape: Shape = "linear"
    over: PositiveTokens | None = None


def normalised(weights: dict[str, float]) -> dict[str, float]:
    """Weights scaled to sum 1. Raises ``ValueError`` when one is negative or not a number."""
    for source, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight of {source!r} is {weight}; it must be a number of 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise ValueError("every weight is zero; give at least one source a positive weight")
    if abs(total - 1) < 1e-15:  # what a division by the total leaves: scaling twice changes nothing
        return dict(weights)
    return {source: weight / total for source, weight in weights.items()}


Weight = Annotated[float, Field(allow_inf_nan=True)]  # refused in `normalised`, by source name
Weights = Annotated[dict[str, Weight], AfterValidator(normalised)]


class MixturePiece(Section):
    """A stretch of the mixture: weights are shares of tokens, normalised to 1."""

    from_: Weights | None = Field(None, alias="from")
    to: Weights
    shape: Shape = "linear"
    over: PositiveTokens | None = None


def _form(value: Any) -> str:
    """Which way of writing a curve was meant, so that only its mistakes are reported."""
    if isinstance(value, list):
        return "<pieces>"
    if isinstance(value, BaseModel):
        return "<piece>"
    return "<piece>" if isinstance(value, dict) else "<value>"


def _mixture_form(value: Any) -> str:
    """As ``_form``; plain weights are a mapping too, of sources to numbers."""
    if not isinstance(value, dict):
        return _form(value) if value is not None else "<value>"
    piece = any(isinstance(value.get(key), dict) for key in ("from", "from_", "to"))
    return "<piece>" if piece or "shape" in value or "over" in value else "<value>"


Curve = Annotated[
    Annotated[float, Tag("<value>")]
    | Annotated[Piece, Tag("<piece>")]
    | Annotated[list[Piece], Field(min_length=1), Tag("<pieces>")],
    Discriminator(_form),
]
BatchCurve = Annotated[
    Annotated[PositiveTokens, Tag("<value>")]
    | Annotated[BatchPiece, Tag("<piece>")]
    | Annotated[list[BatchPiece], Field(min_length=1), Tag("<pieces>")],
    Discriminator(_form),
]
Mixture = Annotated[
    Annotated[Weights, Tag("<value>")]
    | Annotated[MixturePiece, Tag("<piece>")]
    | Annotated[list[MixturePiece], Field(min_length=1), Tag("<pieces>")],
    Discriminator(_mixture_form),
]


class Phase(Section):
    """An interval of the curriculum. A curve left out holds the value the phase before ended on."""

    name: str = Field(pattern=NAME_PATTERN)
    tokens: PositiveTokens
    seq_length: int = Field(gt=0)
    mixture: Mixture | None = None
    global_batch_tokens: BatchCurve | None = None
    learning_rate: Curve | None = None
    weight_decay: Curve | None = None


class Curriculum(Section):
    phases: list[Phase] = Field(min_length=1)

    @field_validator("phases")
    @classmethod
    def _fill_weight_decay(cls, phases: list[Phase]) -> list[Phase]:
        first = phases[0]
        if first.weight_decay is None:
            first = first.model_copy(update={"weight_decay": DEFAULT_WEIGHT_DECAY})
        return [first, *phases[1:]]


class Optimizer(Section):
    """Adam with decoupled weight decay; the rate and the decay come from the curriculum."""

    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, gt=0, description="Largest global gradient norm")


ContextParallelExchange = Literal["p2p", "all_gather", "a2a", "a2a+p2p"]
"""As megatron-core's ``cp_comm_type``."""


class Parallel(Section):
    """How one model is split. The sample order and the result do not depend on it."""

    tensor_model_parallel_size: int = Field(1, gt=0)
    sequence_parallel: bool = False
    pipeline_model_parallel_size: int = Field(1, gt=0)
    virtual_pipeline_model_parallel_size: int | None = Field(None, gt=1)
    num_layers_in_first_pipeline_stage: int | None = Field(
        None, gt=0, description="Default: the layers are spread evenly"
    )
    num_layers_in_last_pipeline_stage: int | None = Field(
        None, gt=0, description="Default: the layers are spread evenly"
    )
    context_parallel_size: int = Field(1, gt=0)
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
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = Field(
        False, description="Reduce gradients bucket by bucket while the backward pass still runs"
    )
    overlap_param_gather: bool = Field(
        False, description="Gather updated weights bucket by bucket while the next forward runs"
    )
    micro_batch_tokens: PositiveTokens = Field(
        description="Tokens per micro-batch of a data-parallel rank; a multiple of every seq_length"
    )
    recompute_granularity: Literal["full", "selective"] | None = None
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


class Training(Section):
    precision: Literal["fp32", "bf16"] = "bf16"
    max_nonfinite_steps: int = Field(
        3, gt=0, description="Stop after this many refused updates in a row"
    )


class Checkpoint(Section):
    every_tokens: PositiveTokens
    keep_last: int = Field(2, gt=0)
    keep_every_tokens: PositiveTokens | None = Field(None, description="Keep one of these for ever")


class Evaluation(Section):
    every_tokens: PositiveTokens
    tokens_per_source: PositiveTokens = Field(65_536, description="Held-out tokens read per source")


class Logging(Section):
    tensorboard: bool = False
    wandb_project: str | None = None
    peak_flops_per_device: float | None = Field(
        None, gt=0, description="In FLOP/s; gives model-FLOPs utilisation when set"
    )


class Recipe(Section):
    """The whole run."""

    name: str = Field(pattern=NAME_PATTERN)
    seed: int = Field(1234, ge=0, lt=2**63)
    run_folder: Path | None = Field(None, strict=False, description="Default: runs/<name>")
    model: Model
    data: Data
    curriculum: Curriculum
    optimizer: Optimizer = Optimizer()
    parallel: Parallel
    training: Training = Training()
    checkpoint: Checkpoint
    evaluation: Evaluation
    logging: Logging = Logging()

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.run_folder or Path("runs") / self.name
