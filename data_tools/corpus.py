"""Reading a corpus: jsonl, one document a line, and what to do about the lines that are not.

Every line is parsed on its own, from bytes: a damaged one is reported with its place and reason,
and the next one is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from megatron_curr.errors import DataError

JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")


@dataclass(frozen=True, slots=True)
class Document:
    """One document; ``line`` counts from 1, ``num_bytes`` is the length of the line in the file."""

    text: str
    file: Path
    line: int
    num_bytes: int
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reject:
    """A line that is not a document; ``byte_offset`` is where the line starts."""

    file: Path
    line: int
    num_bytes: int
    byte_offset: int
    reason: str


def find_files(inputs: Iterable[Path]) -> list[Path]:
    """The jsonl files that the inputs name: files as they are, folders searched to the bottom.

    In the order given, sorted inside a folder. Raises ``DataError`` where there is nothing to read.
    """
    files = []
    for path in inputs:
        if path.is_dir():
            found = sorted(below for below in path.rglob("*") if below.suffix in JSONL_SUFFIXES)
            if not found:
                raise DataError(f"{path}: no {', '.join(JSONL_SUFFIXES)} file in this folder")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise DataError(f"{path}: no such file or folder; give jsonl files or folders of them")
    return files


def read_lines(path: Path, *, text_field: str = "text") -> Iterator[Document | Reject]:
    """Every line of a jsonl file, as a document or as the reason why it is none."""
    offset = 0
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            parsed = _parse(line, text_field)
            if isinstance(parsed, str):
                yield Reject(path, number, len(line), offset, parsed)
            else:
                text = parsed.pop(text_field)
                yield Document(text, path, number, len(line), parsed)
            offset += len(line)


def read_documents(path: Path, *, text_field: str = "text") -> Iterator[Document]:
    """Only the documents of a jsonl file; damaged lines are left to ``read_lines`` to report."""
    for item in read_lines(path, text_field=text_field):
        if isinstance(item, Document):
            yield item


def _parse(line: bytes, text_field: str) -> dict[str, Any] | str:
    """The object on one line, or the reason it is not a document."""
    if not line.strip():
        return "blank line"
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        try:
            line.decode()
        except UnicodeDecodeError:
            return "invalid UTF-8"
        return "invalid JSON"
    if not isinstance(content, dict):
        return "not a JSON object"
    if text_field not in content:
        return f"no field {text_field!r}"
    if not isinstance(content[text_field], str):
        return f"field {text_field!r} is not text"
    if not content[text_field]:
        return "empty text"
    return content
