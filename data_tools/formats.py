"""Reading corpora of every format, row by row, and saying what is wrong with the rows that are bad.

Every row is parsed on its own, from bytes: a damaged one is reported with its place and reason, and
the next one is read. A file that is damaged as a whole raises ``DamagedFile``.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pyarrow as pa

from data_tools.decompression import DECOMPRESSION_ERRORS
from data_tools.line_rows import can_be_cut, read_document, read_lines
from data_tools.rows import DamagedFile, Format, Row, Span
from data_tools.table_rows import block_sizes, read_arrow, read_parquet
from data_tools.tar_rows import read_tar
from megatron_curr.errors import DataError

_PLAIN = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
}
_COMPRESSIONS = ("gz", "bz2", "xz", "zst")
FORMATS: dict[str, Format] = {
    **{suffix: Format(kind, None) for suffix, kind in _PLAIN.items()},
    **{f"{suffix}.{c}": Format(kind, c) for suffix, kind in _PLAIN.items() for c in _COMPRESSIONS},
    ".parquet": Format("parquet", None),
    ".arrow": Format("arrow", None),
    ".tar": Format("tar", None),
    **{f".tar.{compression}": Format("tar", compression) for compression in _COMPRESSIONS},
}
# The same as a message says it.
KNOWN = f"{', '.join(_PLAIN)} or .tar (each also .{', .'.join(_COMPRESSIONS)}), .parquet or .arrow"


def format_of(path: Path) -> Format:
    """The format that a file's name tells. Raises ``DataError`` for an unknown one."""
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if path.name.endswith(suffix):
            return FORMATS[suffix]
    raise DataError(f"{path}: unknown kind of file; known are {KNOWN}")


def parts_of(file: Path, kind: Format, size: int, unit_bytes: int) -> Iterator[Span]:
    """A large file in parts of about ``unit_bytes``, or whole where it has no way in.

    Raises ``DamagedFile`` for what cannot be opened as what its name says.
    """
    if kind.compression is None and kind.kind in ("jsonl", "text"):
        try:
            by_line = can_be_cut(str(file), is_json=kind.kind == "jsonl")
        except OSError as error:
            raise DamagedFile(f"{file}: cannot be read ({error})") from error
        count = size // unit_bytes if by_line else 0  # the last part takes the rest
        cuts = [number * unit_bytes for number in range(count)] + [size]
        for first, end in pairwise(cuts):
            yield Span(str(file), kind, first, end, end - first)
        if not count:
            yield Span(str(file), kind, 0, None, size)
        return
    sizes = block_sizes(file, kind.kind, size)
    first, taken = 0, 0
    for number, block_bytes in enumerate(sizes, start=1):
        taken += block_bytes
        if taken >= unit_bytes or number == len(sizes):
            is_whole = first == 0 and number == len(sizes)
            yield Span(str(file), kind, first, None if is_whole else number, taken)
            first, taken = number, 0
    if not sizes:
        yield Span(str(file), kind, 0, None, size)


def open_rows(span: Span, *, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """The rows of one span. ``fields`` is what a table must give, ``max_bytes`` the longest row.

    Raises ``DamagedFile`` where the file cannot be read on.
    """
    line = 0
    try:
        for row in _READERS[span.format.kind](span, fields, max_bytes):
            line = row.line
            yield row
    except (*DECOMPRESSION_ERRORS, OSError, pa.ArrowException, tarfile.TarError) as error:
        raise _damaged(span, line, error) from error


def _damaged(span: Span, line: int, error: Exception) -> DamagedFile:
    return DamagedFile(
        f"{span.file}: cannot be read beyond row {line:,} of the part that starts at {span.first} "
        f"({type(error).__name__}: {error}); mend or remove the file and run the same command again"
    )


_READERS: dict[str, Callable[[Span, Sequence[str], int], Iterator[Row]]] = {
    "jsonl": read_lines,
    "text": read_lines,
    "document": read_document,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "tar": read_tar,
}
