"""What one worker does with one unit: read, prepare, tokenise, write, and say so last.

A unit leaves a folder with a shard and a document table for each side of the split, the rejected
rows and ``unit.json``. The folder appears under its name when everything in it is on disk.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from data_tools.corpus import Unit
from data_tools.document_table import TableWriter, table_path, table_schema
from data_tools.documents import FILTERED, Document, Preparation
from data_tools.engines import EVERY_TEXT, Engine, Routes, SpecialTokenFound, load_engine
from data_tools.formats import open_rows
from data_tools.options import Options
from data_tools.rows import EMPTY_FILES, NO_LOSS, Row, Span
from data_tools.staging import SPLITS
from data_tools.unknown_text import Unknown, UnknownText
from data_tools.workers import Desk
from megatron_curr.data.idx_format import token_dtype
from megatron_curr.data.manifest import ShardRecord
from megatron_curr.data.shard_writer import ShardWriter
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.durable import sync
from megatron_curr.errors import DataError

RECORD = "unit.json"
REJECTS = "rejects.jsonl"
# Text tokenised at once: gigatoken is 10 to 20 % faster so than by 2M or 60M characters.
_BATCH_CHARS = 8_000_000
_BATCH_REJECTS = 10_000
_LISTED_FIELDS = 20
_NOTHING = np.empty(0, np.uint32)
COUNTERS = ("bytes", "tokens", "rows", "rejects")


@dataclass(frozen=True)
class Job:
    """What is the same for all units of a run."""

    folder: str
    tokenizer: str
    tokenizer_sha256: str  # the file may have changed since another run in this process
    engine: str
    options: Options
    routes: Routes = EVERY_TEXT  # what of a text the engine must not see


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """What one finished unit holds. ``rows`` is the rows read of its last file, bad ones too;
    ``passed_over`` counts by reason what gives no document and loses none, ``unknown`` what the
    tokenizer lost of each side's text."""

    rows: int
    read_bytes: int
    rejects: dict[str, int]
    passed_over: dict[str, int]
    filtered: int
    mended: int
    shards: dict[str, ShardRecord]
    unknown: dict[str, Unknown]

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards.values())

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> UnitRecord:
        content = json.loads((folder / RECORD).read_bytes())
        shards = {split: ShardRecord(**shard) for split, shard in content.pop("shards").items()}
        unknown = {split: Unknown(**lost) for split, lost in content.pop("unknown").items()}
        return cls(**content, shards=shards, unknown=unknown)


def total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Sums by reason, the most frequent first."""
    summed: Counter[str] = Counter()
    for count in counts:
        summed.update(count)
    return dict(sorted(summed.items(), key=lambda item: (-item[1], item[0])))


@dataclass(slots=True)
class _Place:
    """A document and where it came from."""

    document: Document
    file: str
    line: int


@dataclass(slots=True)
class _Reader:
    """Turns the rows of a unit into documents, and keeps count of the rest."""

    unit: Unit
    options: Options
    preparation: Preparation
    rejects: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    filtered: int = 0
    mended: int = 0
    rows: int = 0
    read_bytes: int = 0
    listing: Any = None

    def places(self) -> Iterator[_Place | None]:
        """Documents; ``None`` where many rows were rejected and it is time to say so."""
        fields = self.options.needed_fields
        for span in self.unit.spans:
            self.rows = 0
            limit = self.options.max_document_bytes + (1 << 20)  # a row also holds its metadata
            for row in open_rows(span, fields=fields, max_bytes=limit):
                self.rows = row.line
                self.read_bytes += row.num_bytes
                found = row.content
                if isinstance(found, dict):
                    made = self.preparation.document(found)
                    if isinstance(made, Document):
                        self.mended += row.is_mended
                        yield _Place(made, span.file, row.line)
                        continue
                    found = made
                if found == FILTERED:
                    self.filtered += 1
                elif found in NO_LOSS:
                    self.passed_over[found] += 1
                else:
                    self.rejects[found] += 1
                    self._list(span, found, row)
                    if self.rejects.total() % _BATCH_REJECTS == 0:
                        yield None
            if not self.rows and span.end is None:
                self.passed_over[EMPTY_FILES] += 1
                self._list(span, EMPTY_FILES, Row(0, 0, EMPTY_FILES, 0))

    def _list(self, span: Span, reason: str, row: Row) -> None:
        """Add to the list of rejected rows; ``first`` is where the span begins."""
        place: dict[str, Any] = {"file": span.file, "line": row.line, "reason": reason}
        place |= {"byte_offset": row.byte_offset, "first": span.first}
        if isinstance(row.content, dict):
            place["fields"] = list(row.content)[:_LISTED_FIELDS]
        self.listing.write(orjson.dumps(place) + b"\n")

    def batches(self) -> Iterator[list[_Place]]:
        batch: list[_Place] = []
        num_chars = 0
        for place in self.places():
            if place is not None:
                batch.append(place)
                num_chars += len(place.document.text)
            if place is None or num_chars >= _BATCH_CHARS:
                yield batch
                batch, num_chars = [], 0
        yield batch


@lru_cache(maxsize=2)
def unchanged_tokenizer(path: str, sha256: str) -> Tokenizer:
    """The run's tokenizer. Raises ``DataError`` where the file is another by now."""
    tokenizer = load_tokenizer(path)
    if tokenizer.sha256 != sha256:
        raise DataError(f"{path}: changed during the run; run the same command again")
    return tokenizer


def warm_up(job: Job, desk: Desk) -> None:
    """What a worker can do while the engine is still being chosen."""
    unchanged_tokenizer(job.tokenizer, job.tokenizer_sha256)


@dataclass(frozen=True, slots=True)
class _Tools:
    """What a worker loads once."""

    tokenizer: Tokenizer
    engine: Engine
    preparation: Preparation
    unknown_text: UnknownText


@lru_cache(maxsize=2)
def _tools(job: Job) -> _Tools:
    tokenizer = unchanged_tokenizer(job.tokenizer, job.tokenizer_sha256)
    engine = load_engine(
        tokenizer, job.engine, special_tokens=job.options.special_tokens, routes=job.routes
    )
    gc.freeze()  # all this stays; looking through it again and again took a twentieth of the time
    return _Tools(tokenizer, engine, Preparation(job.options, tokenizer), UnknownText(tokenizer))


def work_on_unit(task: tuple[Job, Unit], desk: Desk) -> UnitRecord:
    """Make one unit, unless it is there. Raises ``DataError`` and ``OSError``; leaves no half."""
    job, unit = task
    final = Path(job.folder) / unit.key
    partial = final.with_name(f"{unit.key}.{os.uname().nodename}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        record = _write_unit(job, unit, partial, desk)
        record.write(partial / RECORD)
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        try:
            os.rename(partial, final)
        except OSError:
            if not (final / RECORD).is_file():  # else another task made the same unit meanwhile
                raise
        sync(final.parent)
        return record
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_unit(job: Job, unit: Unit, folder: Path, desk: Desk) -> UnitRecord:
    tools = _tools(job)
    reader = _Reader(unit, job.options, tools.preparation)
    told_bytes = told_rows = told_rejects = num_documents = 0
    with ExitStack() as stack:
        reader.listing = stack.enter_context(open(folder / REJECTS, "wb"))
        sides = {split: _Side(folder / split, tools, job.options, stack) for split in SPLITS}
        for batch in reader.batches():
            tokens = 0
            for split, side in sides.items():
                places = [p for p in batch if p.document.held_out == (split == "heldout")]
                if places:
                    tokens += side.add(places)
            num_documents += len(batch)
            rejects = reader.rejects.total()
            rows = num_documents + reader.filtered + rejects
            reader.listing.flush()  # whoever stops the run for the rejects lists them
            read_bytes = reader.read_bytes - told_bytes
            desk.add((read_bytes, tokens, rows - told_rows, rejects - told_rejects))
            told_bytes, told_rows, told_rejects = reader.read_bytes, rows, rejects
        shards = {split: side.finish() for split, side in sides.items()}
    desk.add((unit.num_bytes - told_bytes, 0, 0, 0))
    return UnitRecord(
        rows=reader.rows,
        read_bytes=unit.num_bytes,
        rejects=dict(reader.rejects),
        passed_over=dict(reader.passed_over),
        filtered=reader.filtered,
        mended=reader.mended,
        shards=shards,
        unknown={split: side.unknown for split, side in sides.items()},
    )


class _Side:
    """The shard and the document table of one side of the split."""

    def __init__(self, prefix: Path, tools: _Tools, options: Options, stack: ExitStack) -> None:
        self.unknown = Unknown()
        self._prefix = prefix
        self._tools = tools
        self._schema = table_schema(options.columns)
        self._metadata = self._schema.names[-len(options.columns) :] if options.columns else []
        dtype = token_dtype(tools.tokenizer.vocab_size)
        self._shard = stack.enter_context(ShardWriter(prefix, dtype))
        self._table = stack.enter_context(TableWriter(table_path(prefix), self._schema))

    def add(self, places: list[_Place]) -> int:
        """Tokenise documents and append them; how many tokens that made."""
        engine, preparation = self._tools.engine, self._tools.preparation
        documents = [place.document for place in places]
        texts = [document.text for document in documents]
        led = any(document.lead or document.prefix for document in documents)
        try:
            ids, lengths = engine.encode(texts)
            leads = (
                _leads(documents, engine, preparation.meta_ids)
                if led
                else [_NOTHING] * len(documents)
            )
        except SpecialTokenFound as found:
            place = places[found.number]
            raise DataError(
                f"{place.file}: row {place.line:,} of its part holds the special token "
                f"{found.token!r}; --special-tokens error refuses that, text makes it plain text"
            ) from None
        lost = self._tools.unknown_text.count(texts, ids, lengths)
        self.unknown = Unknown.total([self.unknown, lost])
        bos = np.array(preparation.bos_ids, np.uint32)
        masked = np.fromiter(map(len, leads), np.int64, len(leads))
        lengths = len(bos) + masked + lengths + 1
        ids = _joined(bos, leads, ids, lengths, self._tools.tokenizer.eod_id)
        masked[masked > 0] += len(bos)  # it stands before the rest of what carries no loss
        first = self._shard.num_documents
        starts = self._shard.num_tokens + np.cumsum(lengths) - lengths
        self._shard.add_documents(ids, lengths, masked=masked)
        columns: dict[str, Any] = {
            "shard": [self._prefix.name] * len(places),
            "document": np.arange(first, first + len(places)),
            "first_token": starts,
            "num_tokens": lengths,
            "masked_tokens": masked,
            "file": [place.file for place in places],
            "line": [place.line for place in places],
            "content_hash": [document.digest for document in documents],
        }
        values = zip(*(document.values for document in documents), strict=True)
        self._table.add_columns({**columns, **dict(zip(self._metadata, values, strict=False))})
        return len(ids)

    def finish(self) -> ShardRecord:
        table_bytes, table_sha256 = self._table.finish()
        record = self._shard.finish()
        return replace(record, table_bytes=table_bytes, table_sha256=table_sha256)


def _joined(
    bos: NDArray[np.uint32],
    leads: Sequence[NDArray[np.integer[Any]]],
    ids: NDArray[np.integer[Any]],
    lengths: NDArray[np.int64],
    eod_id: int,
) -> NDArray[np.integer[Any]]:
    """All documents end to end: BOS, what leads each, its own tokens, EOD; ``lengths`` is of all
    that."""
    end = np.array([eod_id], ids.dtype)
    pieces = []
    stop = 0
    for lead, length in zip(leads, lengths.tolist(), strict=True):
        start, stop = stop, stop + length - len(bos) - len(lead) - 1
        pieces += (bos, lead, ids[start:stop], end)
    return np.concatenate(pieces)


def _leads(
    documents: list[Document], engine: Engine, meta_ids: list[int]
) -> list[NDArray[np.integer[Any]]]:
    """What goes before each document and carries no loss: control tokens, then its metadata
    between ``<meta>`` and ``</meta>``."""
    ids, lengths = engine.encode([document.prefix or "" for document in documents])
    prefixes = np.split(ids, np.cumsum(lengths)[:-1])
    leads = []
    for document, prefix in zip(documents, prefixes, strict=True):
        parts = [np.array(document.lead, np.int64)]
        if document.prefix is not None:
            parts += [np.array(meta_ids[:1]), prefix, np.array(meta_ids[1:])]
        leads.append(np.concatenate(parts).astype(np.uint32))
    return leads
