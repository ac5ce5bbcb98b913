"""``inspect`` and ``verify``: what shards hold, and whether they still are what they were."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_tools.document_table import table_path, table_schema
from data_tools.unknown_text import Unknown
from megatron_curr.data.idx_format import bin_path, idx_path, masked_path
from megatron_curr.data.manifest import Manifest, ShardRecord, TokenizerRecord, read_manifest
from megatron_curr.data.shards import Shard, ShardSet, open_shards
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError
from megatron_curr.units import format_bytes, format_count

_BAR = 40
_TOP = 5
_SAMPLE_CHARS = 300


@dataclass(slots=True)
class Inspection:
    """What a folder of shards holds. ``histogram`` counts documents by the power of two above
    their length in tokens; ``metadata`` is (value, documents) of each column, the most frequent."""

    folder: str
    shards: int
    documents: int
    tokens: int
    dtype: str
    bin_bytes: int
    tokenizer: str | None
    bos_ids: tuple[int, ...] = ()
    unknown: Unknown = field(default_factory=Unknown)
    masked_tokens: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    metadata: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    rejected_rows: dict[str, int] = field(default_factory=dict)
    faults: list[str] | None = None  # None where nothing was verified

    def json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    def text(self) -> str:
        """A page for people."""
        mean = self.tokens / max(self.documents, 1)
        lines = [
            f"{self.folder}: {self.shards:,} shards, {self.documents:,} documents, "
            f"{self.tokens:,} tokens ({format_count(self.tokens)}) of {self.dtype}, "
            f"{format_bytes(self.bin_bytes)}; {mean:,.0f} tokens a document",
            f"tokenizer: {self.tokenizer or 'not recorded'}",
        ]
        if self.bos_ids:
            lines.append(f"documents begin with: {' '.join(map(str, self.bos_ids))} (BOS)")
        if self.unknown.tokens or self.unknown.characters:
            lines.append(f"text lost: {self.unknown.text()}")
        if self.masked_tokens:
            lines.append(f"tokens without loss: {self.masked_tokens:,}")
        if self.rejected_rows:
            reasons = ", ".join(f"{count:,} {why}" for why, count in self.rejected_rows.items())
            lines.append(f"rejected rows: {reasons}")
        lines.append("document length, tokens:")
        most = max(self.histogram.values(), default=1)
        for bound, count in self.histogram.items():
            bar = "█" * max(round(_BAR * count / most), 1)
            lines.append(f"  up to {bound:>10,} {count:>12,} {bar}")
        for column, top in self.metadata.items():
            values = ", ".join(f"{value!r} {count:,}" for value, count in top)
            lines.append(f"{column}: {values}")
        for sample in self.samples:
            place = f"{sample['shard']} document {sample['document']:,}"
            lines += [f"--- {place}, {sample['tokens']:,} tokens", sample["text"]]
        if self.faults is not None:
            lines += self.faults or ["verified: every file is as it was written"]
        return "\n".join(lines)


def inspect_shards(
    spec: Path,
    *,
    tokenizer: str | None = None,
    num_samples: int = 3,
    seed: int = 0,
    verify: bool = False,
) -> Inspection:
    """Look into the shards that a folder, glob or prefix names.

    Samples are decoded with ``tokenizer``, or with the one that the manifest names where it is
    still there. Raises ``DataError`` for shards that cannot be opened, or another tokenizer.
    """
    shards = open_shards(spec)
    manifest = read_manifest(shards.shards[0].prefix.parent)
    made = manifest.tokenizer if manifest else None
    found = Inspection(
        folder=str(spec),
        shards=len(shards.shards),
        documents=shards.num_documents,
        tokens=shards.num_tokens,
        dtype=str(shards.dtype),
        bin_bytes=shards.num_tokens * shards.dtype.itemsize,
        tokenizer=f"{made.name}, {made.vocab_size:,} ids, sha256 {made.sha256[:16]}"
        if made
        else None,
        bos_ids=made.bos_ids if made else (),
        unknown=Unknown(**manifest.options.get("unknown", {})) if manifest else Unknown(),
        rejected_rows=dict(manifest.options.get("rejected_rows", {})) if manifest else {},
    )
    masked = [m for shard in shards.shards if (m := shard.masked_tokens) is not None]
    found.masked_tokens = sum(int(counts.sum()) for counts in masked)
    found.histogram = _histogram(shards)
    _read_tables(shards, found)
    loaded = _tokenizer(tokenizer, manifest)
    if loaded is not None:
        found.samples = list(_samples(shards, loaded, num_samples, seed))
    if verify:
        found.faults = list(faults_of(spec))
    return found


def _histogram(shards: ShardSet) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for shard in shards.shards:
        lengths = np.diff(shard.document_starts(0, shard.num_documents))
        bounds = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
        values, times = np.unique(bounds, return_counts=True)
        counts.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
    return dict(sorted(counts.items()))


def _read_tables(shards: ShardSet, found: Inspection) -> None:
    """Fill in what the document tables tell."""
    fixed = set(table_schema().names)
    counts: dict[str, Counter[Any]] = {}
    for path in (table_path(shard.prefix) for shard in shards.shards):
        if not path.is_file():
            continue
        with pq.ParquetFile(path) as file:
            names = [name for name in file.schema_arrow.names if name not in fixed]
            for batch in file.iter_batches(columns=names):
                for name in names:
                    for entry in pc.value_counts(batch.column(name)).to_pylist():
                        counts.setdefault(name, Counter())[entry["values"]] += entry["counts"]
    found.metadata = {
        name: [(str(value), count) for value, count in counter.most_common(_TOP)]
        for name, counter in counts.items()
    }


def _tokenizer(given: str | None, manifest: Manifest | None) -> Tokenizer | None:
    made = manifest.tokenizer if manifest else None
    path = given or (str(manifest.options.get("tokenizer", "")) if manifest else "")
    if not path or (given is None and not Path(path).exists()):
        return None
    loaded = load_tokenizer(path)
    if made is not None and loaded.sha256 != made.sha256:
        if given is None:
            return None
        raise DataError(
            f"{given}: is not the tokenizer of these shards, which is {made.name} with sha256 "
            f"{made.sha256[:16]}; this one has {loaded.sha256[:16]}"
        )
    return loaded


def _samples(
    shards: ShardSet, tokenizer: Tokenizer, count: int, seed: int
) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for _ in range(min(count, shards.num_documents)):
        span = shards.spans(draw.randrange(shards.num_tokens), 1)[0]
        first, length = shards.document_range(span.shard, span.document)
        text = tokenizer.decode(shards.read(first, min(length, _SAMPLE_CHARS)).tolist())
        yield {
            "shard": span.shard,
            "document": span.document,
            "tokens": length,
            "text": text[:_SAMPLE_CHARS],
        }


def faults_of(spec: Path) -> Iterator[str]:
    """What is wrong with the shards, one line a file: size, header, order, sha256 against the
    manifest, or what carries no loss. Nothing where all is well. Raises ``DataError`` where they
    cannot even be opened."""
    shards = open_shards(spec)
    known = {
        folder / record.name: (record, manifest.tokenizer)
        for folder in {shard.prefix.parent for shard in shards.shards}
        for manifest in [read_manifest(folder)]
        if manifest is not None
        for record in manifest.shards
    }
    for shard in shards.shards:
        record, tokenizer = known.get(shard.prefix, (None, None))
        faults = [*_index_faults(shard), *_changed_files(shard, record)]
        yield from faults or _masked_faults(shard)
        yield from faults or _bos_faults(shard, tokenizer)


def _changed_files(shard: Shard, record: ShardRecord | None) -> Iterator[str]:
    """Files that are not what the manifest says, where there is one."""
    if record is None:
        return
    files = [
        (bin_path(shard.prefix), record.bin_sha256),
        (idx_path(shard.prefix), record.idx_sha256),
        (masked_path(shard.prefix), record.masked_sha256),
        (table_path(shard.prefix), record.table_sha256),
    ]
    for path, expected in files:
        if not expected:
            continue
        try:
            with open(path, "rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            yield f"{path}: cannot be read ({error.strerror})"
            continue
        if found != expected:
            yield f"{path}: sha256 {found[:16]}, but the manifest says {expected[:16]}"


def _index_faults(shard: Shard) -> Iterator[str]:
    """An index that contradicts itself or its tokens."""
    starts = shard.document_starts(0, shard.num_documents)
    if len(starts) and (starts[0] != 0 or (np.diff(starts) < 0).any()):
        yield f"{idx_path(shard.prefix)}: documents do not follow each other"
    elif len(starts) and starts[-1] != shard.num_tokens:
        yield f"{idx_path(shard.prefix)}: documents end at {starts[-1]:,} of {shard.num_tokens:,}"


def _bos_faults(shard: Shard, tokenizer: TokenizerRecord | None) -> Iterator[str]:
    """Documents that do not begin as the manifest says."""
    starts = shard.document_starts(0, shard.num_documents)
    for place, bos_id in enumerate(tokenizer.bos_ids if tokenizer else ()):
        at = starts[:-1] + place
        other = int((at >= starts[1:]).sum()) + int(
            (shard.tokens[at[at < starts[1:]]] != bos_id).sum()
        )
        if other:
            yield (
                f"{bin_path(shard.prefix)}: {other:,} documents lack the BOS {bos_id} that the "
                "manifest names"
            )


def _masked_faults(shard: Shard) -> Iterator[str]:
    """Tokens without loss that no document has, or that the document table counts otherwise."""
    lengths = np.diff(shard.document_starts(0, shard.num_documents))
    masked = np.zeros_like(lengths) if shard.masked_tokens is None else shard.masked_tokens
    if (masked < 0).any() or (masked > lengths).any():
        yield f"{masked_path(shard.prefix)}: masks more tokens than a document has"
    table = table_path(shard.prefix)
    if not table.is_file():
        return
    try:
        told = pq.read_table(table, columns=["masked_tokens"]).column(0).to_numpy()
    except (pa.ArrowException, OSError) as error:
        yield f"{table}: cannot be read ({error})"
        return
    if not np.array_equal(told, masked):
        yield (
            f"{table}: says of {int(told.sum()):,} tokens that they carry no loss, but "
            f"{masked_path(shard.prefix).name} masks {int(masked.sum()):,}; preprocess again"
        )
