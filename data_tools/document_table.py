"""The document table: one parquet beside each shard, one row a document, in the shard's order.

``shard``, ``document``, ``first_token`` and ``num_tokens`` (with the EOD) say where it is;
``masked_tokens`` how many tokens at its start carry no loss; ``file`` and ``line`` where it came
from; ``content_hash`` is the first 16 bytes of the sha256 of its text; then the metadata columns.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.options import COLUMN_TYPES, Column

_GROUP_ROWS = 65_536
HASH_BYTES = 16


def table_path(prefix: Path) -> Path:
    """The document table of a shard."""
    return prefix.with_name(prefix.name + ".documents.parquet")


def table_schema(columns: Sequence[Column] = ()) -> pa.Schema:
    """The schema with these metadata columns. Their names may repeat the fixed ones."""
    fixed = [
        ("shard", pa.string()),
        ("document", pa.int64()),
        ("first_token", pa.int64()),
        ("num_tokens", pa.int64()),
        ("masked_tokens", pa.int32()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("content_hash", pa.binary(HASH_BYTES)),
    ]
    taken = {name for name, _ in fixed}
    kept = [
        (f"meta_{c.name}" if c.name in taken else c.name, COLUMN_TYPES[c.type]) for c in columns
    ]
    return pa.schema([*fixed, *kept])


class TableWriter:
    """Writes one table beside its name and lets it appear when it is whole.

    Row groups have the same size however the rows arrive, so the same rows give the same bytes.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._writer = pq.ParquetWriter(self._partial, schema, compression="zstd")
        self._schema = schema
        self._waiting: list[pa.Table] = []
        self._num_waiting = 0

    def add(self, rows: pa.Table) -> None:
        """Append rows of the schema."""
        self._waiting.append(rows)
        self._num_waiting += rows.num_rows
        while self._num_waiting >= _GROUP_ROWS:
            joined = pa.concat_tables(self._waiting)
            self._write(joined.slice(0, _GROUP_ROWS))
            self._waiting = [joined.slice(_GROUP_ROWS)]
            self._num_waiting -= _GROUP_ROWS

    def add_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Append rows given as one list a column."""
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        self.add(pa.Table.from_arrays(arrays, schema=self._schema))

    def _write(self, rows: pa.Table) -> None:
        self._writer.write_table(rows.combine_chunks(), _GROUP_ROWS)

    def finish(self) -> tuple[int, str]:
        """Let the table appear; its size and sha256."""
        if self._num_waiting:
            self._write(pa.concat_tables(self._waiting))
        self._writer.close()
        with open(self._partial, "rb") as stream:
            os.fsync(stream.fileno())
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        os.replace(self._partial, self.path)
        return self.path.stat().st_size, sha256

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._writer.close()
            self._partial.unlink(missing_ok=True)


def read_rows(path: Path, first: int, end: int) -> Iterator[pa.Table]:
    """Rows ``first`` to ``end`` of a table, a row group at a time."""
    with pq.ParquetFile(path) as file:
        at = 0
        for group in range(file.num_row_groups):
            num_rows = file.metadata.row_group(group).num_rows
            begin, stop = max(first - at, 0), min(end - at, num_rows)
            if begin < stop:
                yield file.read_row_group(group).slice(begin, stop - begin)
            at += num_rows
