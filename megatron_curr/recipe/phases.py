"""The curriculum as it is written: phases, and curves made of pieces."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag

from megatron_curr.recipe.section import (
    NAME_PATTERN,
    PositiveTokens,
    Section,
    SequenceLength,
    by_name,
)

DEFAULT_WEIGHT_DECAY = 0.1
Shape = Literal["linear", "cosine", "step"]
_FROM = "Where the piece begins; default: where the curve stands"
_SHAPE = "How it gets there; step: the old value to the end of the piece, then the new one"
_OVER = "Tokens that the piece takes; default: the rest of the phase"


class Piece(Section):
    """A stretch of a curve: from one value to another over some tokens, then hold."""

    from_: float | None = Field(None, alias="from", description=_FROM)
    to: float = Field(description="Where the piece ends, and what then holds")
    shape: Shape = Field("linear", description=_SHAPE)
    over: PositiveTokens | None = Field(None, description=_OVER)


class BatchPiece(Section):
    """A stretch of the global-batch curve, climbing in whole increments."""

    from_: PositiveTokens | None = Field(None, alias="from", description=_FROM)
    to: PositiveTokens = Field(description="Tokens of a step where the piece ends")
    increment: PositiveTokens = Field(description="Tokens by which the batch grows at a time")
    shape: Shape = Field("linear", description=_SHAPE)
    over: PositiveTokens | None = Field(None, description=_OVER)


def normalised(weights: dict[str, float]) -> dict[str, float]:
    """Weights scaled to sum 1. Raises ``ValueError`` when one is negative or not a number."""
    for source, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"weight of {source!r} is {weight}; it must be a number of 0 or more")
    total = math.fsum(weights.values())
    if total <= 0:
        raise ValueError("every weight is zero; give at least one a positive weight")
    if abs(total - 1) < 1e-15:  # what a division by the total leaves: scaling twice changes nothing
        return dict(weights)
    return {source: weight / total for source, weight in weights.items()}


Weight = Annotated[float, Field(allow_inf_nan=True)]  # refused in `normalised`, by source name
Weights = Annotated[dict[str, Weight], AfterValidator(normalised), AfterValidator(by_name)]


class MixturePiece(Section):
    """A stretch of the mixture: weights are shares of tokens, normalised to 1."""

    from_: Weights | None = Field(None, alias="from", description=_FROM)
    to: Weights = Field(description="Weights where the piece ends")
    shape: Shape = Field("linear", description=_SHAPE)
    over: PositiveTokens | None = Field(None, description=_OVER)


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


class RunPhase(Section):
    """An interval of the curriculum. A curve left out holds the value the phase before ended on."""

    name: str = Field(pattern=NAME_PATTERN, description="Of the phase, for people and metrics")
    tokens: PositiveTokens = Field(description="Length of the phase")
    mixture: Mixture | None = Field(
        None,
        description="Weights of sources, as shares of tokens: {web: 0.8, code: 0.2}, or pieces",
    )
    global_batch_tokens: BatchCurve | None = Field(
        None, description="Tokens of a step, over all ranks: a count, or pieces"
    )
    learning_rate: Curve | None = Field(
        None, description="A number, or pieces: [{from: 0, to: 3e-4, over: 8B}]"
    )
    weight_decay: Curve | None = Field(
        None, description=f"A number, or pieces; default of the first phase: {DEFAULT_WEIGHT_DECAY}"
    )


class Phase(RunPhase):
    """An interval of a text curriculum."""

    seq_length: SequenceLength = Field(
        description="Tokens of a sample; 4k is 4,096, as models are named"
    )


AnyPhase = TypeVar("AnyPhase", bound=RunPhase)


def with_weight_decay(phases: list[AnyPhase]) -> list[AnyPhase]:
    """The phases, the first with the default weight decay where it has none."""
    first = phases[0]
    if first.weight_decay is None:
        first = first.model_copy(update={"weight_decay": DEFAULT_WEIGHT_DECAY})
    return [first, *phases[1:]]


class Curriculum(Section):
    """What a text run does from its first token to its last."""

    phases: Annotated[list[Phase], AfterValidator(with_weight_decay)] = Field(
        min_length=1, description="One after the other"
    )
