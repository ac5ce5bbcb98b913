"""The ``.bin/.idx`` pair that megatron-core's ``IndexedDataset`` reads, byte by byte.

``.bin`` is the tokens of all sequences, one after the other, nothing else. ``.idx`` is, little
endian and packed (no alignment)::

    9 bytes   magic b"MMIDIDX\\0\\0"
    uint64    version, always 1
    uint8     code of the token type (see ``DTYPE_CODES``)
    uint64    S, number of sequences
    uint64    D, number of entries of the document index (documents + 1)
    int32[S]  length of each sequence, tokens
    int64[S]  where each sequence starts in the .bin, bytes
    int64[D]  first sequence of each document, then S

Source: megatron-core 0.16, ``megatron/core/datasets/indexed_dataset.py``. A document may be several
sequences, and both may be empty.

Beside the pair, and only where some tokens carry no loss, ``.masked`` is an int32 a document: how
many tokens at its start are masked. megatron-core does not know it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_curr.errors import DataError
from megatron_curr.units import format_bytes

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
REDO = "copy the pair again from where it was made, or run `megatron-curr preprocess` again"


@dataclass(frozen=True, slots=True)
class IndexHeader:
    """What the ``.idx`` and the two file sizes say about one shard."""

    dtype: np.dtype[np.integer]
    num_sequences: int
    num_documents: int
    num_tokens: int


def bin_path(prefix: Path) -> Path:
    """``prefix.bin``; a dot in the prefix is part of the name."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """``prefix.idx``; a dot in the prefix is part of the name."""
    return prefix.with_name(prefix.name + ".idx")


def masked_path(prefix: Path) -> Path:
    """``prefix.masked``; a dot in the prefix is part of the name."""
    return prefix.with_name(prefix.name + ".masked")


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """The type Megatron stores a vocabulary in: uint16 below 65,500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65_500 else np.int32)


def header_bytes(dtype: np.dtype[np.integer], num_sequences: int, num_documents: int) -> bytes:
    """The 34 bytes an ``.idx`` starts with."""
    code = next(code for code, known in DTYPE_CODES.items() if np.dtype(known) == dtype)
    return HEADER.pack(MAGIC, VERSION, code, num_sequences, num_documents + 1)


def file_bytes(path: Path) -> int:
    """Size of a file. Raises ``DataError`` when there is none."""
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file; a shard is a .bin and an .idx of the same name, and a .masked "
            f"where its manifest says so; {REDO}"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def read_header(prefix: Path) -> IndexHeader:
    """Check one shard by its header, its last entries and its sizes: a few reads of any file.

    Raises ``DataError`` for a file that is not an index, is cut short, or does not belong to the
    ``.bin`` beside it.
    """
    path = idx_path(prefix)
    bin_bytes, idx_bytes = file_bytes(bin_path(prefix)), file_bytes(path)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        dtype, num_sequences, num_entries = _parse_header(
            path, os.pread(descriptor, HEADER.size, 0)
        )
        expected = HEADER.size + 12 * num_sequences + 8 * num_entries
        # A multimodal index ends with one more byte a sequence; text reads the same without it.
        if idx_bytes not in (expected, expected + num_sequences):
            raise DataError(
                f"{path}: {idx_bytes:,} bytes, but its header ({num_sequences:,} sequences, "
                f"{num_entries - 1:,} documents) needs {expected:,}: the file is cut short or "
                f"overwritten; {REDO}"
            )
        end_bytes, last_entry = _last_entries(descriptor, num_sequences, num_entries, dtype)
    finally:
        os.close(descriptor)
    if last_entry != num_sequences:
        raise DataError(
            f"{path}: its documents end at sequence {last_entry:,} of {num_sequences:,}: the index "
            f"is damaged; {REDO}"
        )
    if end_bytes != bin_bytes:
        kind = "cut short" if bin_bytes < end_bytes else "longer than its index"
        raise DataError(
            f"{bin_path(prefix)}: {bin_bytes:,} bytes, but {path.name} counts {end_bytes:,} "
            f"({end_bytes // dtype.itemsize:,} tokens of {dtype}): the file is {kind}; {REDO}"
        )
    return IndexHeader(dtype, num_sequences, num_entries - 1, bin_bytes // dtype.itemsize)


def _parse_header(path: Path, header: bytes) -> tuple[np.dtype[np.integer], int, int]:
    if header[: len(MAGIC)] != MAGIC[: len(header)]:
        raise DataError(
            f"{path}: starts with {header[:9]!r}, not {MAGIC!r}: this is not a Megatron .idx file; "
            "make shards with `megatron-curr preprocess`"
        )
    if len(header) < HEADER.size:
        raise DataError(
            f"{path}: {len(header)} bytes, less than the header's {HEADER.size}: the file is cut "
            f"short; {REDO}"
        )
    _, version, code, num_sequences, num_entries = HEADER.unpack(header)
    if version != VERSION:
        raise DataError(f"{path}: index version {version}; only version {VERSION} is known; {REDO}")
    if code not in DTYPE_CODES:
        known = ", ".join(f"{code} {np.dtype(dtype)}" for code, dtype in DTYPE_CODES.items())
        raise DataError(f"{path}: token type code {code} is none of {known}; {REDO}")
    if num_entries < 1:
        raise DataError(f"{path}: an empty document index; it holds at least its end; {REDO}")
    return np.dtype(DTYPE_CODES[code]), num_sequences, num_entries


def _last_entries(
    descriptor: int, num_sequences: int, num_entries: int, dtype: np.dtype[np.integer]
) -> tuple[int, int]:
    """End of the last sequence in the .bin (bytes), and the last entry of the document index."""
    (last_entry,) = struct.unpack(
        "<q", os.pread(descriptor, 8, HEADER.size + 12 * num_sequences + 8 * (num_entries - 1))
    )
    if num_sequences == 0:
        return 0, last_entry
    (length,) = struct.unpack("<i", os.pread(descriptor, 4, HEADER.size + 4 * (num_sequences - 1)))
    (start,) = struct.unpack("<q", os.pread(descriptor, 8, HEADER.size + 12 * num_sequences - 8))
    return start + length * dtype.itemsize, last_entry


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def map_bytes(path: Path) -> NDArray[np.uint8]:
    """A file as a read-only byte array that is paged in on touch and holds no file descriptor.

    Python's ``mmap`` (and ``numpy.memmap`` on it) keeps a descriptor open for each map before
    Python 3.13; a few thousand shards would pass the usual limit of 1,024. Raises ``DataError``.
    """
    num_bytes = file_bytes(path)
    if num_bytes == 0:
        return np.empty(0, np.uint8)
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        address = _libc.mmap(None, num_bytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    finally:
        os.close(descriptor)
    if address in (None, ctypes.c_void_p(-1).value):
        reason = os.strerror(ctypes.get_errno())
        raise DataError(f"{path}: cannot map {format_bytes(num_bytes)}: {reason}")
    pages = (ctypes.c_uint8 * num_bytes).from_address(address)
    # Not at interpreter exit: a prefetch thread may still read, and the system unmaps anyway.
    weakref.finalize(pages, _libc.munmap, address, num_bytes).atexit = False
    array: NDArray[np.uint8] = np.ctypeslib.as_array(pages)
    array.flags.writeable = False
    return array
