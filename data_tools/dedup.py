"""Exact duplicates by content hash, in bounded memory: the first of equal documents stays.

Hashes are first dealt by their leading byte to files that are small enough to sort; equal
documents meet in one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.document_table import HASH_BYTES

_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
_MAX_BUCKETS = 256
_BUCKET_DOCUMENTS = 4_000_000  # about 100 MB to sort


def mark_duplicates(tables: Sequence[Path], num_documents: int, keep: Path, *, folder: Path) -> int:
    """Write ``keep``: one byte a document of all tables in order, 0 for a repetition.

    How many repetitions there are. ``folder`` takes the files that are sorted on the way.
    """
    buckets = 1
    while buckets < _MAX_BUCKETS and num_documents > buckets * _BUCKET_DOCUMENTS:
        buckets *= 2
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"hashes_{number}" for number in range(buckets)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for entries in _entries(tables):
            owner = (entries["high"] & np.uint64(0xFF)) % np.uint64(buckets)
            for number, file in enumerate(files):
                entries[owner == number].tofile(file)
    np.ones(num_documents, np.bool_).tofile(keep)
    if num_documents == 0:
        return 0
    kept = np.memmap(keep, np.bool_, "r+")
    for path in paths:
        entries = np.fromfile(path, _ENTRY)
        path.unlink()
        order = np.lexsort((entries["number"], entries["low"], entries["high"]))
        entries = entries[order]
        same = (entries["high"][1:] == entries["high"][:-1]) & (
            entries["low"][1:] == entries["low"][:-1]
        )
        kept[entries["number"][1:][same]] = False
    kept.flush()
    return num_documents - int(np.count_nonzero(kept))


def _entries(tables: Sequence[Path]) -> Iterator[NDArray[np.void]]:
    number = 0
    for table in tables:
        with pq.ParquetFile(table) as file:
            for batch in file.iter_batches(columns=["content_hash"]):
                packed = b"".join(batch.column(0).to_pylist())
                words = np.frombuffer(packed, "<u8").reshape(-1, HASH_BYTES // 8)
                entries = np.empty(len(words), _ENTRY)
                entries["high"], entries["low"] = words[:, 0], words[:, 1]
                entries["number"] = np.arange(number, number + len(words))
                number += len(words)
                yield entries
