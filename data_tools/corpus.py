"""Which files a corpus is made of, and how they are cut into units of work.

A unit is what one worker does in one go and what a killed run loses at most: spans of about the
same size, which are byte ranges of a plain file, row groups of parquet, record batches of Arrow, or
whole files where the format gives no way in. Small files share a unit. Where a unit ends depends on
its own last file only, so a file that is added or mended moves no other unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.formats import format_of, open_rows, parts_of
from data_tools.rows import Format, Span, nested_fields

_NAMED_FILES = 8
_LONGEST_UNIT = 4  # times the size asked for: small files are grouped by chance, see _ends_unit


@dataclass(frozen=True, slots=True)
class Unit:
    """Spans read one after the other. ``key`` names files, their state and the options: what was
    made under the same key need not be made again."""

    key: str
    spans: tuple[Span, ...]

    @property
    def num_bytes(self) -> int:
        return sum(span.num_bytes for span in self.spans)

    @property
    def name(self) -> str:
        """The files, as a message names them."""
        files = list(dict.fromkeys(span.file for span in self.spans))
        more = len(files) - _NAMED_FILES
        return ", ".join(files[:_NAMED_FILES]) + (f" and {more:,} files more" if more > 0 else "")


def plan_units(
    files: Iterable[Path], *, unit_bytes: int, by_line: bool, options_key: str
) -> list[Unit]:
    """All units of a corpus, in the order of its documents.

    ``by_line`` says that a text file is a document a line; ``options_key`` stands for everything
    else that decides what a unit makes. Raises ``DataError`` for a file that cannot be opened.
    """
    units: list[Unit] = []
    spans: list[Span] = []
    states: list[tuple[object, ...]] = []
    pending_bytes = 0

    def close() -> None:
        nonlocal pending_bytes
        content = json.dumps([options_key, states]).encode()
        units.append(Unit(hashlib.blake2b(content, digest_size=12).hexdigest(), tuple(spans)))
        spans.clear()
        states.clear()
        pending_bytes = 0

    for file in files:
        state = file.stat()
        for span in _spans(file, state.st_size, unit_bytes=unit_bytes, by_line=by_line):
            whole = span.num_bytes == state.st_size and state.st_size < unit_bytes
            if not whole and spans:
                close()
            spans.append(span)
            states.append((span.file, span.first, span.end, state.st_size, state.st_mtime_ns))
            pending_bytes += span.num_bytes
            full = pending_bytes >= _LONGEST_UNIT * unit_bytes
            if not whole or full or _ends_unit(span, unit_bytes):
                close()
    if spans:
        close()
    return units


def _ends_unit(span: Span, unit_bytes: int) -> bool:
    """Whether a small file closes its unit: by the hash of its name, once in ``unit_bytes``."""
    drawn = hashlib.blake2b(span.file.encode(), digest_size=8).digest()
    return int.from_bytes(drawn, "little") * unit_bytes < span.num_bytes * 2**64


def _spans(file: Path, size: int, *, unit_bytes: int, by_line: bool) -> Iterator[Span]:
    kind = format_of(file)
    if kind.kind == "text" and kind.compression is None and not by_line:
        kind = Format("document", None)
    if size <= unit_bytes:
        yield Span(str(file), kind, 0, None, size)
    else:
        yield from parts_of(file, kind, size, unit_bytes)


def read_documents(path: Path, *, text_field: str = "text") -> Iterator[str]:
    """The texts of one file; rows that hold none are left to preprocessing to report."""
    span = next(_spans(path, 0, unit_bytes=1, by_line=False))
    for row in open_rows(span, fields=(text_field,), max_bytes=1 << 28):
        if isinstance(row.content, dict):
            text = nested_fields(row.content, (text_field,)).get(text_field)
            if isinstance(text, str) and text:
                yield text
