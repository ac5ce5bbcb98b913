"""Reading corpora of every format, row by row, and saying what is wrong with the rows that are bad.

Every row is parsed on its own, from bytes: a damaged one is reported with its place and reason, and
the next one is read. A file that is damaged as a whole raises ``DamagedFile``.
"""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_curr.errors import DataError

_BUFFER_BYTES = 1 << 20
_ARROW_MAGIC = b"ARROW1"
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class Format:
    """``kind`` is jsonl, text (a document a line), document (a document a file), parquet, arrow or
    tar; ``compression`` is gz, zst or None."""

    kind: str
    compression: str | None


_PLAIN = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "text",
    ".md": "text",
}
FORMATS: dict[str, Format] = {
    **{f"{suffix}": Format(kind, None) for suffix, kind in _PLAIN.items()},
    **{f"{suffix}.gz": Format(kind, "gz") for suffix, kind in _PLAIN.items()},
    **{f"{suffix}.zst": Format(kind, "zst") for suffix, kind in _PLAIN.items()},
    ".parquet": Format("parquet", None),
    ".arrow": Format("arrow", None),
    ".tar": Format("tar", None),
    ".tar.gz": Format("tar", "gz"),
}


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

    ``line`` counts from 1 inside the span: lines, table rows or tar samples. ``num_bytes`` is how
    much of the file was read since the row before, ``byte_offset`` where in the file it starts.
    """

    line: int
    num_bytes: int
    content: dict[str, Any] | str
    byte_offset: int | None = None


class DamagedFile(DataError):
    """A file that cannot be read to its end. Other files can still be worked on meanwhile."""


def format_of(path: Path) -> Format:
    """The format that a file's name tells. Raises ``DataError`` for an unknown one."""
    for suffix in sorted(FORMATS, key=len, reverse=True):
        if path.name.endswith(suffix):
            return FORMATS[suffix]
    raise DataError(f"{path}: unknown kind of file; known are {', '.join(FORMATS)}")


def parts_of(file: Path, kind: Format, size: int, unit_bytes: int) -> Iterator[Span]:
    """A large file in parts of about ``unit_bytes``, or whole where it has no way in."""
    if kind.compression is None and kind.kind in ("jsonl", "text"):
        count = size // unit_bytes  # the last part takes the rest
        cuts = [number * unit_bytes for number in range(count)] + [size]
        for first, end in pairwise(cuts):
            yield Span(str(file), kind, first, end, end - first)
        return
    sizes = _block_sizes(file, kind, size)
    first, taken = 0, 0
    for number, block_bytes in enumerate(sizes, start=1):
        taken += block_bytes
        if taken >= unit_bytes or number == len(sizes):
            yield Span(str(file), kind, first, number, taken)
            first, taken = number, 0
    if not sizes:
        yield Span(str(file), kind, 0, None, size)


def _block_sizes(file: Path, kind: Format, size: int) -> list[int]:
    """About how many bytes of the file each row group or record batch takes; [] for neither."""
    try:
        if kind.kind == "parquet":
            footer = pq.ParquetFile(file).metadata
            groups = [footer.row_group(n).total_byte_size for n in range(footer.num_row_groups)]
            scale = size / max(sum(groups), 1)
            return [int(group * scale) for group in groups]
        if kind.kind == "arrow" and _is_arrow_file(file):
            with pa.OSFile(str(file)) as source:
                count = pa.ipc.open_file(source).num_record_batches
            return [size // count] * count if count else []
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{file}: cannot be read as {kind.kind} ({error})") from error
    return []


def open_rows(span: Span, *, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """The rows of one span. ``fields`` is what a table must give, ``max_bytes`` the longest row.

    Raises ``DamagedFile`` where the file cannot be read on.
    """
    line = 0
    try:
        for row in _READERS[span.format.kind](span, fields, max_bytes):
            line = row.line
            yield row
    except (EOFError, zlib.error, OSError, pa.ArrowException, tarfile.TarError) as error:
        raise _damaged(span, line, error) from error


def _damaged(span: Span, line: int, error: Exception) -> DamagedFile:
    return DamagedFile(
        f"{span.file}: cannot be read beyond row {line:,} of the part that starts at {span.first} "
        f"({type(error).__name__}: {error}); mend or remove the file and run the same command again"
    )


def _read_lines(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    parse = parse_json if span.format.kind == "jsonl" else _parse_text
    with open(span.file, "rb", buffering=_BUFFER_BYTES) as file:
        stream = _decompressed(file, span.format.compression)
        offset = _skip_to_line(stream, span.first) if span.first else 0
        read_at, number = file.tell() if stream is not file else span.first, 0
        while span.end is None or offset < span.end:
            line = stream.readline(max_bytes + 1)
            if not line:
                break
            number += 1
            content: dict[str, Any] | str
            length = len(line)
            if length > max_bytes and not line.endswith(b"\n"):
                length += _skip_line(stream)
                content = f"longer than {max_bytes:,} bytes"
            else:
                content = parse(line)
            now_at = offset + length if stream is file else file.tell()
            yield Row(number, now_at - read_at, content, offset)
            read_at = now_at
            offset += length


def _decompressed(file: BinaryIO, compression: str | None) -> BinaryIO:
    if compression is None:
        return file
    if not os.fstat(file.fileno()).st_size:
        raise EOFError("it has 0 bytes, which no compressed file has")
    if compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), _BUFFER_BYTES)
    # Arrow's reader knows a frame that is cut short; zstandard's ends there as if all were well.
    reader = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return io.BufferedReader(reader, _BUFFER_BYTES)


def _skip_to_line(stream: BinaryIO, first: int) -> int:
    """Go to the first line that starts at ``first`` or later; where that is."""
    stream.seek(first - 1)
    return first - 1 + _skip_line(stream)


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line, in pieces; how many bytes that took."""
    skipped = 0
    while piece := stream.readline(_BUFFER_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def parse_json(line: bytes) -> dict[str, Any] | str:
    """The object on one line, or the reason it is none."""
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        if not line.strip():
            return "blank line"
        try:
            line.decode()
        except UnicodeDecodeError:
            return "invalid UTF-8"
        return "invalid JSON"
    return content if isinstance(content, dict) else "not a JSON object"


def _parse_text(line: bytes) -> dict[str, Any] | str:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return "invalid UTF-8"
    return {"text": text} if text.strip() else "blank line"


def _read_document(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    with open(span.file, "rb") as file:
        content = _decompressed(file, span.format.compression).read(max_bytes + 1)
        yield Row(1, span.num_bytes, _text_document(content, max_bytes), 0)


def _text_document(content: bytes, max_bytes: int) -> dict[str, Any] | str:
    if len(content) > max_bytes:
        return f"longer than {max_bytes:,} bytes"
    try:
        return {"text": content.decode()}
    except UnicodeDecodeError:
        return "invalid UTF-8"


def _read_parquet(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    with pq.ParquetFile(span.file) as file:
        groups = list(range(span.first, file.num_row_groups if span.end is None else span.end))
        columns = _columns(span, fields, file.schema_arrow.names)
        batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns)
        num_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        yield from _table_rows(batches, span.num_bytes, num_rows)


def _read_arrow(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    with pa.OSFile(span.file) as source:
        if not _is_arrow_file(Path(span.file)):
            stream = pa.ipc.open_stream(source)
            columns = _columns(span, fields, stream.schema.names)
            yield from _table_rows((batch.select(columns) for batch in stream), span.num_bytes, 0)
            return
        file = pa.ipc.open_file(source)
        columns = _columns(span, fields, file.schema.names)
        end = file.num_record_batches if span.end is None else span.end
        batches = (file.get_batch(number).select(columns) for number in range(span.first, end))
        yield from _table_rows(batches, span.num_bytes, 0)


def _is_arrow_file(path: Path) -> bool:
    """Whether record batches can be read in any order: the file format, not the stream format."""
    with open(path, "rb") as file:
        return file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC


def _columns(span: Span, fields: Sequence[str], names: Sequence[str]) -> list[str]:
    missing = [field for field in fields if field not in names]
    if missing:
        raise DataError(
            f"{span.file}: no column {missing[0]!r}; it has {', '.join(names)}. Name the text with "
            "--text-field and keep or filter by columns that are there"
        )
    return list(fields)


def _table_rows(batches: Iterator[pa.RecordBatch], num_bytes: int, num_rows: int) -> Iterator[Row]:
    """Rows of record batches; the bytes are spread evenly where the number of rows is known."""
    line = 0
    for batch in batches:
        names = batch.schema.names
        columns = [_values(batch.column(name)) for name in names]
        for values in zip(*columns, strict=True):
            line += 1
            row_bytes = num_bytes // num_rows if num_rows else 0
            if any(value is _UNDECODABLE for value in values):
                yield Row(line, row_bytes, "invalid UTF-8")
            else:
                yield Row(line, row_bytes, dict(zip(names, values, strict=True)))


_UNDECODABLE = object()


def _values(column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast(pa.large_binary()).to_pylist()]


def _decoded(value: bytes | None) -> object:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return _UNDECODABLE


def _read_tar(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """Samples of a webdataset tar: neighbouring members whose names agree up to the first dot.

    ``.json`` gives fields, ``.txt`` the text; other members (pictures, ...) are passed over.
    """
    with open(span.file, "rb") as file, tarfile.open(fileobj=file, mode="r|*") as archive:
        key, content, line, read_at = "", None, 0, 0
        for member in archive:
            if not member.isfile():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if f"{folder}/{stem}" != key:
                if content is not None:
                    line += 1
                    yield Row(line, file.tell() - read_at, content)
                    read_at = file.tell()
                key, content = f"{folder}/{stem}", {"__key__": f"{folder}/{stem}".lstrip("/")}
            if suffix in ("json", "txt"):
                content = _with_member(content, archive, member, suffix, max_bytes)
        if content is not None:
            yield Row(line + 1, max(span.num_bytes - read_at, 0), content)
        _check_end(archive)


def _check_end(archive: tarfile.TarFile) -> None:
    """A tar ends with blocks of zeros, which tarfile does not insist on. Raises ``ReadError``."""
    stream = archive.fileobj
    assert stream is not None
    if stream.tell() - archive.offset < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no block of zeros at its end: the file is cut short")
    while rest := stream.read(_BUFFER_BYTES):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("goes on behind its end: several tars in one file")


def _with_member(
    content: dict[str, Any] | str | None,
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    suffix: str,
    max_bytes: int,
) -> dict[str, Any] | str:
    """The fields of a sample with those of one more member; a reason stays a reason."""
    if not isinstance(content, dict):
        return content or ""
    if member.size > max_bytes:
        return f"longer than {max_bytes:,} bytes"
    stream = archive.extractfile(member)
    data = stream.read() if stream else b""
    added = parse_json(data) if suffix == "json" else _text_document(data, max_bytes)
    return added if isinstance(added, str) else {**content, **added}


_READERS: dict[str, Callable[[Span, Sequence[str], int], Iterator[Row]]] = {
    "jsonl": _read_lines,
    "text": _read_lines,
    "document": _read_document,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "tar": _read_tar,
}
