"""What decides the bytes that preprocessing makes, and how a run is carried out."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa

from data_tools.filters import Filter
from megatron_curr.errors import DataError

COLUMN_TYPES: Mapping[str, pa.DataType] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
}
NORMALISATIONS = ("nfc", "nfkc", "newlines", "strip")
UNIT_BYTES = 64 << 20
SPECIAL_TOKENS = ("text", "allow", "error")
BOS = ("auto", "yes", "no")


@dataclass(frozen=True, slots=True)
class Column:
    """A metadata field that goes into the document table, as ``name`` or ``name:type``."""

    name: str
    type: str

    @classmethod
    def parse(cls, text: str) -> Column:
        name, colon, kind = text.rpartition(":")
        column = cls(name, kind) if colon else cls(text, "str")
        if column.type not in COLUMN_TYPES or not column.name:
            raise DataError(
                f"--metadata {text}: write NAME or NAME:TYPE with one of {', '.join(COLUMN_TYPES)}"
            )
        return column


@dataclass(frozen=True, slots=True)
class Control:
    """Control tokens by buckets of a score: ``tokens[i]`` up to ``bounds[i]``, the last above."""

    field: str
    tokens: tuple[str, ...]
    bounds: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Control:
        """``quality: <|low|> 0.3 <|mid|> 0.7 <|high|>``: tokens with rising bounds between them."""
        name, _, rest = text.partition(":")
        words = rest.split()
        try:
            bounds = tuple(map(float, words[1::2]))
        except ValueError:
            bounds = ()
        rising = all(low < high for low, high in pairwise(bounds))
        if not name.strip() or len(words) % 2 == 0 or len(bounds) != len(words) // 2 or not rising:
            raise DataError(
                f"--control-tokens {text!r}: write FIELD: TOKEN BOUND TOKEN ..., such as "
                "'quality: <|low|> 0.3 <|mid|> 0.7 <|high|>', with rising bounds"
            )
        return cls(name.strip(), tuple(words[0::2]), bounds)


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes that come out; recorded in the manifest."""

    text_field: str = "text"
    heldout_frac: float = 0.02
    shard_tokens: int = 1_000_000_000
    metadata: tuple[str, ...] = ()
    filter: str | None = None
    deduplicate: bool = False
    max_document_bytes: int = 32 << 20
    text_by_line: bool = False
    special_tokens: str = "text"
    bos: str = "auto"
    template: str | None = None
    normalize: tuple[str, ...] = ()
    metadata_prefix: tuple[str, ...] = ()
    control_tokens: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_frac < 1:
            raise DataError(f"heldout_frac {self.heldout_frac}: must be from 0 to below 1")
        for name in ("shard_tokens", "max_document_bytes"):
            if getattr(self, name) <= 0:
                raise DataError(f"{name} {getattr(self, name)}: must be positive")
        if self.special_tokens not in SPECIAL_TOKENS:
            raise DataError(
                f"special_tokens {self.special_tokens!r}: must be {', '.join(SPECIAL_TOKENS)}"
            )
        if self.bos not in BOS:
            raise DataError(f"bos {self.bos!r}: must be {', '.join(BOS)}")
        unknown = set(self.normalize).difference(NORMALISATIONS)
        if unknown:
            raise DataError(f"normalize {min(unknown)!r}: known are {', '.join(NORMALISATIONS)}")
        names = [column.name for column in self.columns]
        if len(set(names)) < len(names):
            raise DataError(f"metadata {', '.join(names)}: a column is named twice")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The metadata that the document table keeps."""
        return tuple(map(Column.parse, self.metadata))

    @property
    def control(self) -> Control | None:
        return None if self.control_tokens is None else Control.parse(self.control_tokens)

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """The fields that a document must be read with: the columns of a table."""
        fields = [column.name for column in self.columns]
        fields += self.metadata_prefix
        if self.filter is not None:
            fields += Filter(self.filter).fields
        if self.control is not None:
            fields.append(self.control.field)
        fields += [self.text_field] if self.template is None else template_fields(self.template)
        return tuple(dict.fromkeys(fields))

    @property
    def key(self) -> str:
        """Everything here that decides what a unit of work makes."""
        content = asdict(self)
        del content["shard_tokens"], content["deduplicate"]  # they only matter to the last step
        return json.dumps(content, sort_keys=True)

    def record(self) -> dict[str, Any]:
        """Every option by name, for the manifest."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RunSettings:
    """How a run is carried out; none of it changes a byte of the shards."""

    num_workers: int = 1
    unit_bytes: int = UNIT_BYTES
    max_rejected_frac: float = 0.01
    max_unknown_frac: float = 0.01
    engine: str = "auto"
    task: int | None = None
    num_tasks: int = 1
    finish: bool = False

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.num_tasks < 1 or self.unit_bytes < 1:
            raise DataError("workers, num_tasks and unit_bytes must be positive")
        if self.task is not None and not 0 <= self.task < self.num_tasks:
            raise DataError(
                f"task {self.task}: tasks go from 0 to {self.num_tasks - 1} (--num-tasks)"
            )
        if self.task is not None and self.finish:
            raise DataError("--task and --finish: give one; --finish comes after all tasks")
        for name in ("max_rejected_frac", "max_unknown_frac"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"{name} {getattr(self, name)}: must be from 0 to 1")


def template_fields(template: str) -> list[str]:
    """The fields in ``Question: {question}``. Raises ``DataError`` for what is no plain name."""
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"--template {template!r}: {error}; write {{{{ for a brace") from error
    wrong = [name for name in fields if not re.fullmatch(r"[\w-]+", name)]
    if wrong or not fields:
        raise DataError(f"--template {template!r}: needs fields by plain name, such as {{text}}")
    return fields
