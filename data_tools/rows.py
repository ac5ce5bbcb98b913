"""What is read of a corpus: spans of files, their rows, and how a whole file can be bad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_curr.errors import DataError

# Reasons for which a row or file gives no document although nothing is lost.
BLANK_LINES = "blank lines"
EMPTY_FILES = "empty files"
NO_LOSS = frozenset({BLANK_LINES, EMPTY_FILES})
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Format:
    """``kind`` is jsonl, text (a document a line), document (a document a file), parquet, arrow or
    tar; ``compression`` is gz, bz2, xz, zst or None."""

    kind: str
    compression: str | None


@dataclass(frozen=True, slots=True)
class Span:
    """A part of one file: bytes, row groups or record batches ``first`` to ``end`` (to the file's
    end where that is None). ``num_bytes`` is its share of the file, for progress."""

    file: str
    format: Format
    first: int
    end: int | None
    num_bytes: int


@dataclass(slots=True)
class Row:
    """One row of a span. ``content`` is its fields, or the reason why there are none.

    ``line`` counts from 1 inside the span: lines, JSON values, table rows or tar samples.
    ``num_bytes`` is how much of the file was read since the row before, ``byte_offset`` where in
    its text, decompressed, it starts. ``is_mended``: lone surrogates in it became U+FFFD.
    """

    line: int
    num_bytes: int
    content: dict[str, Any] | str
    byte_offset: int | None = None
    is_mended: bool = False


def nested_fields(content: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """What ``meta.url`` and the like name, as far as it is there. A key that is written so wins
    over what is nested, at every depth."""
    found = {}
    for name in names:
        value = _nested(content, name)
        if value is not _ABSENT:
            found[name] = value
    return found


def _nested(content: Mapping[str, Any], name: str) -> Any:
    if name in content:
        return content[name]
    head = name
    while "." in head:
        head = head.rpartition(".")[0]
        inside = content.get(head)
        if inside is None and head in content:
            return None
        if isinstance(inside, Mapping):
            value = _nested(inside, name[len(head) + 1 :])
            if value is not _ABSENT:
                return value
    return _ABSENT


class DamagedFile(DataError):
    """A file that cannot be read to its end. Other files can still be worked on meanwhile."""
