"""What every section of a recipe is made of: strict, frozen models, names and counts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from megatron_curr.units import parse_count

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


class Section(BaseModel):
    """Frozen, deaf to no unknown key, and strict: ``true`` is no number, ``"4"`` no count."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, strict=True, allow_inf_nan=False
    )
