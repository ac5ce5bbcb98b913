"""One source of text: its shards as one token stream, read through memory maps on first touch.

Shards follow each other in the order of their paths, and the stream is their ``.bin`` files end to
end; a window may begin in one shard and end in the next. Opening costs two ``stat`` calls a shard
where a ``manifest.json`` lies beside them, else four small reads more.
"""

from __future__ import annotations

import glob
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.idx_format import (
    HEADER,
    REDO,
    IndexHeader,
    bin_path,
    file_bytes,
    idx_path,
    map_bytes,
    masked_path,
    read_header,
)
from megatron_curr.data.manifest import (
    FILE_NAME,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    read_manifest,
)
from megatron_curr.data.shard_writer import ShardWriter
from megatron_curr.errors import DataError

__all__ = ["Shard", "ShardSet", "ShardWriter", "Span", "check_vocabulary", "open_shards"]


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one document inside a window; ``first_token`` counts inside the document."""

    shard: str
    document: int
    first_token: int
    num_tokens: int


class Shard:
    """One ``.bin/.idx`` pair. Its tokens and its index are mapped when they are first used.

    ``has_masked`` says that some of its tokens carry no loss, and that a ``.masked`` tells which.
    ``record`` is what a manifest says of it.
    """

    def __init__(
        self,
        prefix: Path,
        header: IndexHeader,
        max_token_id: int | None = None,
        *,
        has_masked: bool = False,
        record: ShardRecord | None = None,
    ) -> None:
        self.prefix = prefix
        self.record = record
        self.dtype = header.dtype
        self.num_sequences = header.num_sequences
        self.num_documents = header.num_documents
        self.num_tokens = header.num_tokens
        self.max_token_id = max_token_id
        self.has_masked = has_masked
        if has_masked and (found := file_bytes(masked_path(prefix))) != 4 * self.num_documents:
            raise DataError(
                f"{masked_path(prefix)}: {found:,} bytes, but {self.num_documents:,} documents "
                f"need {4 * self.num_documents:,}: cut short, or of another shard; {REDO}"
            )

    @property
    def name(self) -> str:
        return self.prefix.name

    @cached_property
    def tokens(self) -> NDArray[np.integer]:
        """Every token of the shard, [num_tokens], read-only and paged in on touch."""
        pages = map_bytes(bin_path(self.prefix))
        if pages.nbytes != self.num_tokens * self.dtype.itemsize:
            raise DataError(
                f"{bin_path(self.prefix)}: changed to {pages.nbytes:,} bytes since it was opened "
                f"with {self.num_tokens:,} tokens; shards must not change during a run"
            )
        return pages.view(self.dtype)

    @cached_property
    def _index(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sequence starts in bytes [S] and the document index [D]; both unaligned views.

        Search them with ``bisect``, which reads a few entries: ``numpy.searchsorted`` would first
        copy the whole array to align it.
        """
        # With a manifest this is the first look into the index itself.
        header = read_header(self.prefix)
        if (header.num_sequences, header.num_documents) != (self.num_sequences, self.num_documents):
            raise DataError(
                f"{idx_path(self.prefix)}: holds {header.num_documents:,} documents, but "
                f"{FILE_NAME} says {self.num_documents:,}: the two do not belong together; {REDO}"
            )
        pages = map_bytes(idx_path(self.prefix))
        starts_at = HEADER.size + 4 * self.num_sequences
        documents_at = starts_at + 8 * self.num_sequences
        starts = np.frombuffer(pages, "<i8", self.num_sequences, starts_at)
        return starts, np.frombuffer(pages, "<i8", self.num_documents + 1, documents_at)

    @cached_property
    def masked_tokens(self) -> NDArray[np.int32] | None:
        """How many tokens at the start of each document carry no loss, [num_documents]."""
        return map_bytes(masked_path(self.prefix)).view("<i4") if self.has_masked else None

    def document_at(self, token: int) -> int:
        """The document that holds this token of the shard; O(log documents)."""
        starts, documents = self._index
        sequence = bisect_right(starts, token * self.dtype.itemsize) - 1
        return bisect_right(documents, sequence) - 1

    def document_starts(self, first: int, last: int) -> NDArray[np.int64]:
        """First token, inside the shard, of documents ``first`` to ``last`` (both included)."""
        starts, documents = self._index
        sequences = documents[first : last + 1]
        inside = sequences < self.num_sequences  # an empty document may stand behind all sequences
        bytes_at = np.full(len(sequences), self.num_tokens * self.dtype.itemsize, np.int64)
        bytes_at[inside] = starts[sequences[inside]]
        return bytes_at // self.dtype.itemsize


class ShardSet:
    """The shards of one source as one token stream. Safe to read from several threads.

    ``shard_starts`` [shards + 1] is where each shard begins in the stream, then ``num_tokens``.
    ``tokenizers`` are those that the manifests say made the shards, each once.
    """

    def __init__(
        self, name: str, shards: list[Shard], *, tokenizers: Iterable[TokenizerRecord] = ()
    ) -> None:
        self.name = name
        self.tokenizers = tuple(dict.fromkeys(tokenizers))
        self.shards = shards
        self.paths = [bin_path(shard.prefix) for shard in shards]
        self.shard_starts = np.cumsum([0, *(shard.num_tokens for shard in shards)], dtype=np.int64)
        self.num_tokens = int(self.shard_starts[-1])
        self.num_documents = sum(shard.num_documents for shard in shards)
        self.has_masked = any(shard.has_masked for shard in shards)
        self.dtype = np.result_type(*{shard.dtype for shard in shards})
        self._starts: list[int] = self.shard_starts.tolist()

    @property
    def max_token_id(self) -> int | None:
        """Largest token id of all shards, or ``None`` where no manifest says so."""
        known = [shard.max_token_id for shard in self.shards]
        return None if None in known else max(token for token in known if token is not None)

    def read(self, first_token: int, count: int) -> NDArray[np.integer]:
        """``count`` tokens of the stream, [count], in the shards' own dtype.

        Inside one shard this is a read-only view of the memory map: copy it to keep or change it.
        """
        number = bisect_right(self._starts, first_token) - 1
        begin = first_token - self._starts[number]
        inside = 0 <= first_token < self.num_tokens
        if inside and first_token + count <= self._starts[number + 1]:
            return self.shards[number].tokens[begin : begin + count]
        pieces = [
            self.shards[shard].tokens[begin:end]
            for shard, begin, end in self._pieces(first_token, count)
        ]
        return np.concatenate([np.empty(0, self.dtype), *pieces])

    def spans(self, first_token: int, count: int) -> list[Span]:
        """Which documents a window is made of, in reading order; empty documents are left out."""
        spans = []
        for number, begin, end in self._pieces(first_token, count):
            shard = self.shards[number]
            first, last = shard.document_at(begin), shard.document_at(end - 1)
            starts = shard.document_starts(first, last)
            ends = np.append(starts[1:], end)
            for document, start, stop in zip(range(first, last + 1), starts, ends, strict=True):
                entered = max(int(start), begin)
                if stop > entered:
                    spans.append(
                        Span(
                            self.labels[number],
                            document,
                            entered - int(start),
                            int(stop) - entered,
                        )
                    )
        return spans

    def document_starts(self, first_token: int, count: int) -> NDArray[np.int64]:
        """Where in the window [0, count) a document begins; strictly increasing."""
        found = []
        for number, begin, end in self._pieces(first_token, count):
            shard = self.shards[number]
            starts = shard.document_starts(shard.document_at(begin), shard.document_at(end - 1))
            starts = starts[starts >= begin]
            if len(starts) > 1:
                starts = starts[np.append(True, starts[1:] != starts[:-1])]  # empty documents
            found.append(starts + (self._starts[number] - first_token))
        return found[0] if len(found) == 1 else np.concatenate([np.empty(0, np.int64), *found])

    def masked_spans(self, first_token: int, count: int) -> list[tuple[int, int]]:
        """Which tokens of the window [0, count) carry no loss: begin and end of each run."""
        found: list[tuple[int, int]] = []
        for number, begin, end in self._pieces(first_token, count):
            shard = self.shards[number]
            if shard.masked_tokens is None:
                continue
            first, last = shard.document_at(begin), shard.document_at(end - 1)
            starts = shard.document_starts(first, last)
            ends = np.minimum(starts + shard.masked_tokens[first : last + 1], end)
            shift = self._starts[number] - first_token
            for start, stop in zip(starts.tolist(), ends.tolist(), strict=True):
                if stop > max(start, begin):
                    found.append((max(start, begin) + shift, stop + shift))
        return found

    def document_range(self, shard: str, document: int) -> tuple[int, int]:
        """A document's first token in the stream and its length; ``shard`` is one of ``labels``.

        Raises ``DataError`` for an unknown shard or document.
        """
        number = self._numbers.get(shard, -1)
        if number < 0:
            raise DataError(
                f"{self.name}: no shard {shard!r}; they go from {self.labels[0]!r} to "
                f"{self.labels[-1]!r}"
            )
        found = self.shards[number]
        if not 0 <= document < found.num_documents:
            raise DataError(
                f"document {document} of {found.prefix}: it holds documents 0 to "
                f"{found.num_documents - 1:,}"
            )
        first, end = found.document_starts(document, document + 1).tolist()
        return self._starts[number] + first, end - first

    @cached_property
    def labels(self) -> list[str]:
        """What each shard is called: its name, or its path where two folders use one name."""
        times = Counter(shard.name for shard in self.shards)
        return [
            shard.name if times[shard.name] == 1 else str(shard.prefix) for shard in self.shards
        ]

    def place_of(self, token: int) -> tuple[str, int]:
        """The shard that holds a token of the stream, and the token's number inside it."""
        number = bisect_right(self._starts, token) - 1
        return str(self.paths[number]), token - self._starts[number]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {label: number for number, label in enumerate(self.labels)}

    def _pieces(self, first_token: int, count: int) -> list[tuple[int, int, int]]:
        """(shard, first token, end token) of every shard a window touches."""
        end_token = first_token + count
        if first_token < 0 or count < 0 or end_token > self.num_tokens:
            raise IndexError(
                f"tokens {first_token:,} to {end_token:,} of {self.name}, "
                f"which has {self.num_tokens:,}"
            )
        pieces = []
        number = bisect_right(self._starts, first_token) - 1
        while first_token < end_token:
            start, stop = self._starts[number], min(self._starts[number + 1], end_token)
            if stop > first_token:
                pieces.append((number, first_token - start, stop - start))
                first_token = stop
            number += 1
        return pieces


def check_vocabulary(shard_set: ShardSet, vocab_size: int) -> None:
    """Raise ``DataError`` when a manifest says that a shard holds ids beyond the vocabulary."""
    for shard in shard_set.shards:
        if shard.max_token_id is not None and shard.max_token_id >= vocab_size:
            raise DataError(
                f"{bin_path(shard.prefix)}: holds token id {shard.max_token_id}, but the "
                f"vocabulary has {vocab_size:,} ids (0 to {vocab_size - 1}): the shards were made "
                "with another tokenizer; set data.tokenizer to that one or preprocess again"
            )


def open_shards(spec: str | Path, *, name: str | None = None) -> ShardSet:
    """The shards that a folder, a glob or a prefix names, as one stream in path order.

    Raises ``DataError`` when there are none, when one is damaged, or when all are empty.
    """
    prefixes = _find_prefixes(str(spec))
    manifests = {folder: read_manifest(folder) for folder in {prefix.parent for prefix in prefixes}}
    records: dict[Path, tuple[Manifest, ShardRecord]] = {
        folder / record.name: (manifest, record)
        for folder, manifest in manifests.items()
        if manifest is not None
        for record in manifest.shards
    }
    missing = set(records).difference(prefixes) if Path(spec).is_dir() else set()
    if missing:
        raise DataError(
            f"{bin_path(min(missing))}: listed in {FILE_NAME} but not there "
            f"({len(missing)} of {len(records)} shards); {REDO}"
        )
    shards = []
    for prefix in prefixes:
        if manifests[prefix.parent] is None:
            shards.append(open_shard(prefix))
        elif prefix in records:
            shards.append(_shard_from_manifest(prefix, *records[prefix]))
        else:
            raise DataError(
                f"{idx_path(prefix)}: is not in the {FILE_NAME} beside it: preprocessing was not "
                f"finished, or the shard was added by hand; move it to another folder, or delete "
                f"{FILE_NAME} to open every shard by its index"
            )
    made_by = [m.tokenizer for m in manifests.values() if m is not None and m.tokenizer is not None]
    shard_set = ShardSet(name or str(spec), shards, tokenizers=made_by)
    if shard_set.num_tokens == 0:
        raise DataError(
            f"{spec}: {len(shards)} shards, {shard_set.num_documents:,} documents, but not one "
            "token: an empty source cannot be trained on; check the corpus and the rejects.jsonl "
            "that preprocessing wrote"
        )
    return shard_set


def open_shard(prefix: Path) -> Shard:
    """One shard by its own files, whatever a manifest says. Raises ``DataError``."""
    return Shard(prefix, read_header(prefix), has_masked=masked_path(prefix).exists())


def _shard_from_manifest(prefix: Path, manifest: Manifest, record: ShardRecord) -> Shard:
    for path, expected in (
        (bin_path(prefix), record.bin_bytes),
        (idx_path(prefix), record.idx_bytes),
    ):
        found = file_bytes(path)
        if found != expected:
            raise DataError(
                f"{path}: {found:,} bytes, but {FILE_NAME} says {expected:,}: the file is cut "
                f"short or was replaced; {REDO}"
            )
    header = IndexHeader(
        np.dtype(manifest.dtype), record.num_sequences, record.num_documents, record.num_tokens
    )
    return Shard(
        prefix, header, record.max_token_id, has_masked=bool(record.masked_sha256), record=record
    )


def _find_prefixes(spec: str) -> list[Path]:
    """The shard prefixes a folder, a glob or a prefix names, sorted. Raises ``DataError``."""
    if os.path.isdir(spec):
        return _prefixes_in(Path(spec))
    if glob.has_magic(spec):
        matches = sorted(glob.glob(spec)) or sorted(glob.glob(spec + ".idx"))
        prefixes: set[Path] = set()
        for match in map(Path, matches):
            if match.is_dir():
                prefixes.update(_prefixes_in(match))
            elif match.suffix in (".bin", ".idx"):
                prefixes.add(match.with_suffix(""))
        if not prefixes:
            raise DataError(f"{spec}: no .bin/.idx shard matches this glob; check data.sources")
        return sorted(prefixes, key=str)
    prefix = Path(spec[: -len(".idx")] if spec.endswith((".bin", ".idx")) else spec)
    if not (idx_path(prefix).exists() or bin_path(prefix).exists()):
        raise DataError(
            f"{spec}: neither a folder nor a shard ({prefix.name}.bin, {prefix.name}.idx); check "
            "data.sources in the recipe, or make the shards with `megatron-curr preprocess`"
        )
    return [prefix]


def _prefixes_in(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries]
    stems = {name[: -len(".idx")] for name in names if name.endswith((".bin", ".idx"))}
    if not stems:
        below = sorted(path.parent.name for path in folder.glob("*/*.idx"))
        hint = f"; there are some in {folder / below[0]}" if below else ""
        raise DataError(f"{folder}: no .bin/.idx shard in this folder{hint}")
    return [folder / stem for stem in sorted(stems)]
