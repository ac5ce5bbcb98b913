"""Cutting shards anew: the documents of many shards, in order, into shards of one size.

The last step of preprocessing, which joins what the workers made, and ``merge-shards`` and
``split-shards``. A shard ends with the document that fills it, so where the documents came from
does not show in the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from data_tools.document_table import TableWriter, read_rows, table_path
from megatron_curr.data.idx_format import bin_path, read_header
from megatron_curr.data.manifest import ShardRecord
from megatron_curr.data.shard_writer import ShardWriter
from megatron_curr.data.shards import open_shard

_BLOCK_TOKENS = 2_000_000  # what a cache holds: 8M take half again as long


@dataclass(frozen=True, slots=True)
class Part:
    """Documents ``first`` to ``end`` of a shard.

    ``line_base`` is added to their line numbers. ``keep`` is a file with one byte a document, 0
    where it is left out; the shard's first document has byte ``keep_at``.
    """

    prefix: Path
    first: int
    end: int
    line_base: int = 0
    keep: Path | None = None
    keep_at: int = 0

    def kept(self) -> NDArray[np.bool_] | None:
        """Which of the documents stay; ``None`` for all."""
        if self.keep is None:
            return None
        count = self.end - self.first
        return np.fromfile(self.keep, np.bool_, count, offset=self.keep_at + self.first)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard that is to be made."""

    prefix: Path
    dtype: str
    parts: tuple[Part, ...]
    schema: pa.Schema | None  # of its document table; None for no table


def cut(parts: Sequence[Part], *, shard_tokens: int) -> list[tuple[Part, ...]]:
    """The parts of each new shard. A shard ends after the document that fills it."""
    shards: list[tuple[Part, ...]] = []
    pending: list[Part] = []
    room = shard_tokens
    for part in parts:
        lengths = document_lengths(part.prefix, part.first, part.end)
        kept = part.kept()
        ends = np.cumsum(lengths if kept is None else lengths * kept)
        first, taken = 0, 0
        while first < len(ends) and int(ends[-1]) - taken >= room:
            end = int(np.searchsorted(ends, taken + room)) + 1
            piece = replace(part, first=part.first + first, end=part.first + end)
            shards.append((*pending, piece))
            first, taken, room = end, int(ends[end - 1]), shard_tokens
            pending = []
        if first < len(ends) and (kept is None or kept[first:].any()):
            pending.append(replace(part, first=part.first + first))
            room -= int(ends[-1]) - taken
    if pending:
        shards.append(tuple(pending))
    return shards


def document_lengths(prefix: Path, first: int, end: int) -> NDArray[np.int64]:
    """Tokens of documents ``first`` to ``end`` of a shard."""
    return np.diff(open_shard(prefix).document_starts(first, end))


def build_shard(plan: ShardPlan, desk: object = None) -> ShardRecord:
    """Write one shard, and its document table; its record. Checks what it wrote."""
    plan.prefix.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(plan.prefix, np.dtype(plan.dtype)) as writer:
        table = None
        if plan.schema is not None:
            with TableWriter(table_path(plan.prefix), plan.schema) as rows:
                for part in plan.parts:
                    first_token, first_document = writer.num_tokens, writer.num_documents
                    lengths = _copy_documents(part, writer)
                    _copy_rows(part, rows, plan, lengths, first_token, first_document)
                table = rows.finish()
        else:
            for part in plan.parts:
                _copy_documents(part, writer)
        record = writer.finish()
    read_header(plan.prefix)
    if table is None:
        return record
    return replace(record, table_bytes=table[0], table_sha256=table[1])


def _copy_documents(part: Part, writer: ShardWriter) -> NDArray[np.int64]:
    """Append the part's documents that stay; the length of each."""
    shard = open_shard(part.prefix)
    kept = part.kept()
    masked = shard.masked_tokens
    masked = None if masked is None else masked[part.first : part.end]
    appended = []
    starts = shard.document_starts(part.first, part.end)
    for begin, stop in _blocks(starts):
        # Read rather than mapped: mapped pages would count as this process's memory.
        tokens = np.fromfile(
            bin_path(part.prefix),
            shard.dtype,
            int(starts[stop] - starts[begin]),
            offset=int(starts[begin]) * shard.dtype.itemsize,
        )
        lengths = np.diff(starts[begin : stop + 1])
        leads = None if masked is None else masked[begin:stop]
        if kept is not None:
            stay = kept[begin:stop]
            tokens, lengths = tokens[np.repeat(stay, lengths)], lengths[stay]
            leads = None if leads is None else leads[stay]
        writer.add_documents(tokens, lengths, masked=leads)
        appended.append(lengths)
    return np.concatenate([np.empty(0, np.int64), *appended])


def _blocks(starts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Runs of documents of about ``_BLOCK_TOKENS``, at least one document each."""
    begin, count = 0, len(starts) - 1
    while begin < count:
        stop = int(np.searchsorted(starts, starts[begin] + _BLOCK_TOKENS, side="right")) - 1
        stop = min(max(stop, begin + 1), count)
        yield begin, stop
        begin = stop


def _copy_rows(
    part: Part,
    rows: TableWriter,
    plan: ShardPlan,
    lengths: NDArray[np.int64],
    first_token: int,
    first_document: int,
) -> None:
    """The part's rows of its document table, with their place in the new shard."""
    kept = part.kept()
    starts = first_token + np.cumsum(lengths) - lengths
    at = done = 0
    for table in read_rows(table_path(part.prefix), part.first, part.end):
        count = table.num_rows
        if kept is not None:
            table = table.filter(pa.array(kept[at : at + count]))
        at += count
        stop = done + table.num_rows
        names = pa.repeat(pa.scalar(plan.prefix.name), table.num_rows)
        line = table.column("line").to_numpy() + part.line_base
        for name, values in (
            ("shard", names),
            ("document", pa.array(np.arange(first_document + done, first_document + stop))),
            ("first_token", pa.array(starts[done:stop])),
            ("num_tokens", pa.array(lengths[done:stop])),
            ("line", pa.array(line)),
        ):
            table = table.set_column(table.schema.get_field_index(name), name, values)
        rows.add(table.cast(plan.schema))
        done = stop
