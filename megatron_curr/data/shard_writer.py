"""Writing one shard, byte for byte as megatron-core's ``IndexedDatasetBuilder`` would."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_curr.data.idx_format import bin_path, header_bytes, idx_path, masked_path
from megatron_curr.data.manifest import ShardRecord
from megatron_curr.durable import sync
from megatron_curr.errors import DataError

_MAX_SEQUENCE_TOKENS = 2**31 - 1


class ShardWriter:
    """One ``.bin/.idx`` pair, one sequence a document; it appears only when it is whole.

    The files are written beside their names (``.partial``), flushed to disk and renamed, the
    ``.idx`` last, so a reader never sees an index without its tokens. Where some tokens carry no
    loss, ``.masked`` says how many at the start of each document. Leaving the ``with`` block by an
    exception removes what was written.
    """

    def __init__(self, prefix: Path, dtype: np.dtype[np.integer]) -> None:
        self.prefix = prefix
        self.dtype = dtype
        self.num_tokens = 0
        self.max_token_id = -1
        self.record: ShardRecord | None = None
        self._lengths: list[NDArray[np.int64]] = []
        self._masked: list[tuple[int, NDArray[np.int32]]] = []  # from which document on
        self._limits = np.iinfo(dtype)
        self._sha256 = hashlib.sha256()
        self._partial_bin = _partial(bin_path(prefix))
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self._partial_bin, "wb")  # noqa: SIM115 - closed by finish and abort

    @property
    def num_documents(self) -> int:
        return sum(len(lengths) for lengths in self._lengths)

    def add_document(self, tokens: ArrayLike) -> None:
        """Append one document; its EOD, if it is to have one, is its last token."""
        tokens = np.asarray(tokens)
        self.add_documents(tokens, [len(tokens)])

    def add_documents(
        self,
        tokens: ArrayLike,
        lengths: Sequence[int] | NDArray[Any],
        *,
        masked: NDArray[Any] | None = None,
    ) -> None:
        """Append many documents at once: their tokens end to end, the length of each, and how many
        tokens at the start of each carry no loss.

        Raises ``DataError`` for a token id the dtype cannot hold and for a document of 2**31
        tokens or more, which the format cannot.
        """
        token_array = np.asarray(tokens)
        length_array = np.asarray(lengths, np.int64)
        if int(length_array.sum()) != len(token_array):
            raise ValueError(
                f"{len(token_array)} tokens, but the lengths add up to {length_array.sum()}"
            )
        if len(token_array):
            lowest, highest = int(token_array.min()), int(token_array.max())
            if lowest < self._limits.min or highest > self._limits.max:
                wrong = lowest if lowest < self._limits.min else highest
                raise DataError(
                    f"{bin_path(self.prefix)}: token id {wrong} does not fit {self.dtype}; "
                    "the tokenizer's vocabulary size is smaller than its largest id"
                )
            self.max_token_id = max(self.max_token_id, highest)
        if len(length_array) and int(length_array.max()) > _MAX_SEQUENCE_TOKENS:
            raise DataError(
                f"{bin_path(self.prefix)}: a document of {length_array.max():,} tokens; the format "
                f"holds at most {_MAX_SEQUENCE_TOKENS:,}; split it"
            )
        if masked is not None and masked.any():
            assert (masked >= 0).all() and (masked <= length_array).all()
            self._masked.append((self.num_documents, masked.astype(np.int32)))
        content = np.ascontiguousarray(token_array, self.dtype).data
        self._bin.write(content)
        self._sha256.update(content)
        self._lengths.append(length_array)
        self.num_tokens += len(token_array)

    def finish(self) -> ShardRecord:
        """Make the shard appear under its name and say what it holds."""
        lengths = np.concatenate([np.empty(0, np.int64), *self._lengths])
        ends = np.cumsum(lengths) * self.dtype.itemsize
        starts = ends - lengths * self.dtype.itemsize
        index = b"".join(
            (
                header_bytes(self.dtype, len(lengths), len(lengths)),
                lengths.astype("<i4").tobytes(),
                starts.astype("<i8").tobytes(),
                np.arange(len(lengths) + 1, dtype="<i8").tobytes(),
            )
        )
        masked = self._masked_tokens(len(lengths))
        self._bin.flush()
        os.fsync(self._bin.fileno())
        self._bin.close()
        os.replace(self._partial_bin, bin_path(self.prefix))
        masked_path(self.prefix).unlink(missing_ok=True)  # a shard before this may have left one
        if masked:
            _write(masked_path(self.prefix), masked)
        _write(idx_path(self.prefix), index)
        sync(self.prefix.parent)
        self.record = ShardRecord(
            name=self.prefix.name,
            num_documents=len(lengths),
            num_sequences=len(lengths),
            num_tokens=self.num_tokens,
            max_token_id=self.max_token_id,
            bin_bytes=self.num_tokens * self.dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            masked_sha256=hashlib.sha256(masked).hexdigest() if masked else "",
        )
        return self.record

    def _masked_tokens(self, num_documents: int) -> bytes:
        """What ``.masked`` holds; nothing where no token is masked."""
        if not self._masked:
            return b""
        counts = np.zeros(num_documents, "<i4")
        for first, masked in self._masked:
            counts[first : first + len(masked)] = masked
        return counts.tobytes()

    def abort(self) -> None:
        """Remove what was written so far; nothing under the final names is touched."""
        self._bin.close()
        for path_of in (bin_path, masked_path, idx_path):
            _partial(path_of(self.prefix)).unlink(missing_ok=True)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort()
        elif self.record is None:
            self.finish()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write(path: Path, content: bytes) -> None:
    """Let a file appear when it is on disk."""
    partial = _partial(path)
    partial.write_bytes(content)
    sync(partial)
    os.replace(partial, path)
