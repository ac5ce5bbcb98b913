"""What every section of a recipe is made of: strict, frozen models, names and counts."""

from __future__ import annotations

from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from megatron_curr.units import parse_count, parse_length

NAME_PATTERN = r"^[A-Za-z0-9_.-]+$"
_COUNT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^[0-9][0-9_]*(\.[0-9]+)?([eE][+-]?[0-9]+)?\s*[kKmMbBtT]?$"},
    ],
    "title": "A count: 4096, 400k, 1.5T",
}
_LENGTH_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 1},
        {"type": "string", "pattern": r"^[0-9]+\s*[kKmM]?$"},
    ],
    "title": "A length in tokens: 4096, 4k (which is 4,096)",
}

PositiveTokens = Annotated[
    int, BeforeValidator(parse_count), Field(gt=0), WithJsonSchema(_COUNT_SCHEMA)
]

SequenceLength = Annotated[
    int, BeforeValidator(parse_length), Field(gt=0), WithJsonSchema(_LENGTH_SCHEMA)
]


Value = TypeVar("Value")


def by_name(table: dict[str, Value]) -> dict[str, Value]:
    """The table in the one order it has whatever its author wrote first: code point by code point.

    Sources, shapes and weights are numbered as their tables go, and ties fall by those numbers.
    """
    return dict(sorted(table.items()))


class Section(BaseModel):
    """Frozen, deaf to no unknown key, and strict: ``true`` is no number, ``"4"`` no count."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, strict=True, allow_inf_nan=False
    )
