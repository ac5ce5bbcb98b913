"""Turn jsonl documents into the indexed shards of one source, and a held-out part of them.

``OUT/train`` and ``OUT/heldout`` get ``.bin/.idx`` shards with a ``manifest.json``; lines that are
no document are listed in ``OUT/rejects.jsonl``. A document is held out by the hash of its text, so
the split stays as it is when the corpus grows, and a repeated document is never on both sides.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import TextIO

import numpy as np

from data_tools.corpus import Document, Reject, find_files, read_lines
from data_tools.progress import ReadProgress
from megatron_curr.data.idx_format import token_dtype
from megatron_curr.data.manifest import (
    FILE_NAME,
    Manifest,
    ShardRecord,
    TokenizerRecord,
    write_manifest,
)
from megatron_curr.data.shard_writer import ShardWriter
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError
from megatron_curr.units import format_bytes

SPLITS = ("train", "heldout")
REJECTS = "rejects.jsonl"
_BATCH_CHARS = 1_000_000  # text tokenised at once: keeps the threads busy, costs a few tens of MB


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the bytes that come out; recorded in the manifest."""

    text_field: str = "text"
    heldout_frac: float = 0.02
    shard_tokens: int = 1_000_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.heldout_frac < 1:
            raise DataError(f"heldout_frac {self.heldout_frac}: must be from 0 to below 1")
        if self.shard_tokens <= 0:
            raise DataError(f"shard_tokens {self.shard_tokens}: must be positive")


@dataclass(frozen=True, slots=True)
class Summary:
    """What one run wrote."""

    folder: Path
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    rejects: Mapping[str, int]
    read_bytes: int
    elapsed_s: float

    def text(self) -> str:
        """What a person wants to know of the run, in a few lines."""
        lines = [
            f"{self.folder / split}: {self.documents[split]:,} documents, "
            f"{self.tokens[split]:,} tokens"
            for split in SPLITS
        ]
        if self.rejects:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejects.items())
            lines.append(f"rejected lines: {reasons}; listed in {self.folder / REJECTS}")
        rate = self.read_bytes / max(self.elapsed_s, 1e-3) / 1e6
        lines.append(f"{format_bytes(self.read_bytes)} in {self.elapsed_s:.1f} s, {rate:.1f} MB/s")
        return "\n".join(lines)

    def json(self) -> str:
        """The same for scripts."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})


@dataclass(slots=True)
class _Split:
    """The shards of one side of the split, one open at a time."""

    folder: Path
    shard_name: str
    dtype: np.dtype[np.integer]
    shard_tokens: int
    writer: ShardWriter | None = None
    finished: list[ShardRecord] = field(default_factory=list)

    def add(self, documents: Sequence[list[int]]) -> None:
        """Append documents, beginning a new shard after the one that passes ``shard_tokens``."""
        for batch in self._by_room(documents):
            if self.writer is None:
                prefix = self.folder / f"{self.shard_name}_{len(self.finished):05d}"
                self.writer = ShardWriter(prefix, self.dtype)
            lengths = [len(document) for document in batch]
            tokens = np.fromiter(chain.from_iterable(batch), np.int64, sum(lengths))
            self.writer.add_documents(tokens, lengths)
            if self.writer.num_tokens >= self.shard_tokens:
                self.close()

    def _by_room(self, documents: Sequence[list[int]]) -> Iterator[Sequence[list[int]]]:
        """Documents in runs that each end where the open shard is full."""
        first = 0
        room = self.shard_tokens - (self.writer.num_tokens if self.writer else 0)
        for number, document in enumerate(documents):
            room -= len(document)
            if room <= 0:
                yield documents[first : number + 1]
                first, room = number + 1, self.shard_tokens
        if first < len(documents):
            yield documents[first:]

    def close(self) -> None:
        if self.writer is not None:
            self.finished.append(self.writer.finish())
            self.writer = None


def preprocess(
    inputs: Sequence[Path],
    output: Path,
    *,
    tokenizer: str | Path,
    options: Options | None = None,
    overwrite: bool = False,
    num_threads: int = 2,
    show_progress: bool = True,
) -> Summary:
    """Write the shards of one source to ``output``: all of them, or nothing.

    The same inputs, tokenizer and options give the same bytes, for any number of threads. Raises
    ``DataError`` for wrong input, a folder that is already there, and a full disk.
    """
    options = options or Options()
    files = find_files(inputs)
    loaded = load_tokenizer(tokenizer)
    staging = output.with_name(output.name + ".partial")
    _check_free(output, overwrite=overwrite)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    total_bytes = sum(path.stat().st_size for path in files)
    try:
        with ReadProgress(f"preprocess {output.name}", total_bytes, show=show_progress) as progress:
            splits, rejects = _write(
                files,
                staging,
                source=output.name,
                tokenizer=loaded,
                options=options,
                num_threads=num_threads,
                progress=progress,
            )
            _publish(staging, output)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.rmtree(staging, ignore_errors=True)
        raise DataError(
            f"{output}: the disk is full; nothing was published. Free some space (the shards take "
            "about 0.6 bytes for each byte of text) and run the same command again"
        ) from error
    except DataError:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Summary(
        folder=output,
        documents={
            name: sum(r.num_documents for r in split.finished) for name, split in splits.items()
        },
        tokens={name: sum(r.num_tokens for r in split.finished) for name, split in splits.items()},
        rejects=dict(rejects),
        read_bytes=progress.read_bytes,
        elapsed_s=progress.elapsed_s,
    )


def _write(
    files: Sequence[Path],
    staging: Path,
    *,
    source: str,
    tokenizer: Tokenizer,
    options: Options,
    num_threads: int,
    progress: ReadProgress,
) -> tuple[dict[str, _Split], Counter[str]]:
    dtype = token_dtype(tokenizer.vocab_size)
    # The source is part of the name, so that a shard is known by its name alone in a mixture.
    splits = {
        split: _Split(staging / split, f"{source}_{split}", dtype, options.shard_tokens)
        for split in SPLITS
    }
    rejects: Counter[str] = Counter()
    lines = chain.from_iterable(read_lines(path, text_field=options.text_field) for path in files)
    with open(staging / REJECTS, "w", encoding="utf-8") as listing:
        for batch in _batches(_without_rejects(lines, listing, rejects, progress)):
            encoded = tokenizer.encode_batch([d.text for d in batch], num_threads=num_threads)
            sides: dict[str, list[list[int]]] = {name: [] for name in SPLITS}
            for document, ids in zip(batch, encoded, strict=True):
                ids.append(tokenizer.eod_id)
                held_out = is_held_out(document.text, options.heldout_frac)
                sides["heldout" if held_out else "train"].append(ids)
            for name, documents in sides.items():
                splits[name].add(documents)
            progress.advance(
                num_bytes=sum(d.num_bytes for d in batch), tokens=sum(map(len, encoded))
            )
    for split in splits.values():
        split.close()
    if not splits["train"].finished:
        found = ", ".join(f"{count:,} {reason}" for reason, count in rejects.most_common())
        names = ", ".join(map(str, files))
        raise DataError(
            f"{names}: no document to train on (rejected: {found or 'nothing'}); "
            f"each line must be a JSON object with text in {options.text_field!r}"
        )
    for name, split in splits.items():
        if split.finished:
            write_manifest(split.folder, _manifest(split, name, tokenizer, options, files, rejects))
    return splits, rejects


def is_held_out(text: str, heldout_frac: float) -> bool:
    """Whether a document belongs to the held-out side: by the hash of its text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"heldout").digest()
    return int.from_bytes(digest, "little") < heldout_frac * 2.0**64


def _without_rejects(
    lines: Iterable[Document | Reject],
    listing: TextIO,
    rejects: Counter[str],
    progress: ReadProgress,
) -> Iterator[Document]:
    """The documents; every other line is counted by reason and listed with its place."""
    for item in lines:
        if isinstance(item, Document):
            yield item
            continue
        rejects[item.reason] += 1
        place = {"file": str(item.file), "line": item.line, "byte_offset": item.byte_offset}
        listing.write(json.dumps({**place, "reason": item.reason}, ensure_ascii=False) + "\n")
        progress.advance(num_bytes=item.num_bytes, rejects=1)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    num_chars = 0
    for document in documents:
        batch.append(document)
        num_chars += len(document.text)
        if num_chars >= _BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _manifest(
    split: _Split,
    name: str,
    tokenizer: Tokenizer,
    options: Options,
    files: Sequence[Path],
    rejects: Mapping[str, int],
) -> Manifest:
    return Manifest(
        dtype=str(split.dtype),
        tokenizer=TokenizerRecord(
            tokenizer.name, tokenizer.sha256, tokenizer.vocab_size, tokenizer.eod_id
        ),
        shards=tuple(split.finished),
        options={
            **asdict(options),
            "split": name,
            "inputs": [{"file": path.name, "bytes": path.stat().st_size} for path in files],
            "rejected_lines": dict(sorted(rejects.items())),
        },
    )


def _check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to touch a folder that is there, unless it is ours and was offered up."""
    if not output.exists():
        return
    if not overwrite:
        raise DataError(
            f"{output}: already there; give another --output, or --overwrite to replace it"
        )
    ours = any((output / name / FILE_NAME).is_file() for name in SPLITS)
    if not ours and any(output.iterdir()):
        raise DataError(f"{output}: holds other files than shards of ours; give another --output")


def _publish(staging: Path, output: Path) -> None:
    """Let the finished folder appear under its name; an old one goes only then."""
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(staging, output)
    shutil.rmtree(old, ignore_errors=True)
