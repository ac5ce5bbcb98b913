"""Rows of parquet and Arrow files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.rows import DamagedFile, Row, Span
from megatron_curr.errors import DataError

_ARROW_MAGIC = b"ARROW1"
_ROWS_AT_ONCE = 1024
_UNDECODABLE = object()


def block_sizes(file: Path, kind: str, size: int) -> list[int]:
    """About how many bytes of the file each row group or record batch takes; [] for neither."""
    try:
        if kind == "parquet":
            footer = pq.ParquetFile(file).metadata
            groups = [footer.row_group(n).total_byte_size for n in range(footer.num_row_groups)]
            scale = size / max(sum(groups), 1)
            return [int(group * scale) for group in groups]
        if kind == "arrow" and _is_arrow_file(file):
            with pa.OSFile(str(file)) as source:
                count = pa.ipc.open_file(source).num_record_batches
            return [size // count] * count if count else []
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{file}: cannot be read as {kind} ({error})") from error
    return []


def read_parquet(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """Rows of some row groups."""
    with pq.ParquetFile(span.file) as file:
        groups = list(range(span.first, file.num_row_groups if span.end is None else span.end))
        leaves = [file.metadata.schema.column(n).path for n in range(file.metadata.num_columns)]
        columns = _columns(span, fields, file.schema_arrow, leaves=leaves)
        batches = file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=columns)
        num_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        yield from _table_rows(batches, span.num_bytes, num_rows)


def read_arrow(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """Rows of some record batches of an Arrow file, or of a whole stream."""
    with pa.OSFile(span.file) as source:
        if not _is_arrow_file(Path(span.file)):
            stream = pa.ipc.open_stream(source)
            columns = _columns(span, fields, stream.schema)
            yield from _table_rows((batch.select(columns) for batch in stream), span.num_bytes, 0)
            return
        file = pa.ipc.open_file(source)
        columns = _columns(span, fields, file.schema)
        end = file.num_record_batches if span.end is None else span.end
        batches = (file.get_batch(number).select(columns) for number in range(span.first, end))
        yield from _table_rows(batches, span.num_bytes, 0)


def _is_arrow_file(path: Path) -> bool:
    """Whether record batches can be read in any order: the file format, not the stream format."""
    with open(path, "rb") as file:
        return file.read(len(_ARROW_MAGIC)) == _ARROW_MAGIC


def _columns(
    span: Span, fields: Sequence[str], schema: pa.Schema, *, leaves: Sequence[str] = ()
) -> list[str]:
    """The columns that hold the fields: ``meta`` for ``meta.url``, if that is no column itself,
    or no more of ``meta`` than its leaf of that name."""
    found = []
    for field in fields:
        column = field
        while column not in schema.names and "." in column:
            column = column.rpartition(".")[0]
        if column not in schema.names:
            raise DataError(
                f"{span.file}: no column {field!r}; it has {', '.join(schema.names)}. Name the "
                "text with --text-field and keep or filter by columns that are there"
            )
        found.append(field if field in leaves else column)
    return list(dict.fromkeys(found))


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


def _values(column: pa.Array) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        return values
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar: pa.Scalar) -> object:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return _UNDECODABLE
