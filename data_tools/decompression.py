"""Streams over compressed files that end where the file is whole, and nowhere else.

Files of several members, frames or streams are read to the last; zstd frames with windows of up to
2 GiB (``--long=31``) and skippable ones too. What is cut short, or goes on with something else,
raises one of ``DECOMPRESSION_ERRORS``: Python's own readers of bz2 and xz end there in silence.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from backports.zstd import DecompressionParameter, ZstdDecompressor, ZstdError

BUFFER_BYTES = 1 << 20
DECOMPRESSION_ERRORS = (EOFError, zlib.error, lzma.LZMAError, ZstdError)
_CHUNK_BYTES = 1 << 17
_LONGEST_WINDOW_LOG = 31


def _zstd_frame() -> ZstdDecompressor:
    return ZstdDecompressor(options={DecompressionParameter.window_log_max: _LONGEST_WINDOW_LOG})


_DECODERS: dict[str, Callable[[], Any]] = {
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
    "zst": _zstd_frame,
}


def decompressed(file: BinaryIO, compression: str | None) -> BinaryIO:
    """What a file holds, from its start. Raises ``EOFError`` for a compressed file of no byte."""
    if compression is None:
        return file
    if not os.fstat(file.fileno()).st_size:
        raise EOFError("it has 0 bytes, which no compressed file has")
    if compression == "gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), BUFFER_BYTES)
    return io.BufferedReader(_Frames(file, _DECODERS[compression]), BUFFER_BYTES)


class _Frames(io.RawIOBase):
    """Frames one behind the other, each by a decoder of its own."""

    def __init__(self, file: BinaryIO, new_decoder: Callable[[], Any]) -> None:
        self._file, self._new_decoder = file, new_decoder
        self._decoder: Any = None
        self._ahead = b""  # read from the file and not yet decoded
        self._any_frame = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self._decoder is None and not self._begin_frame():
                return 0
            decoder = self._decoder
            data, self._ahead = self._ahead, b""
            if not data and decoder.needs_input:
                data = self._file.read(_CHUNK_BYTES)
                if not data:
                    raise EOFError("the file ends inside a compressed frame")
            found = decoder.decompress(data, len(buffer))
            if decoder.eof:
                self._ahead, self._decoder = decoder.unused_data, None
            if found:
                buffer[: len(found)] = found
                return len(found)

    def _begin_frame(self) -> bool:
        """Whether there is one more frame; zeros behind a frame are padding."""
        while True:
            self._ahead = self._ahead or self._file.read(_CHUNK_BYTES)
            if not self._ahead:
                return False
            if self._any_frame:
                self._ahead = self._ahead.lstrip(b"\0")
            if self._ahead:
                self._decoder, self._any_frame = self._new_decoder(), True
                return True
