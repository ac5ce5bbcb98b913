"""Compressed files end where they are whole, whatever wrote them."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from data_tools.decompression import DECOMPRESSION_ERRORS, decompressed

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd.compress,
}
BROKEN = (*DECOMPRESSION_ERRORS, OSError)
TEXT = b"".join(b"line %d of some text\n" % number for number in range(400))


def read(path: Path, compression: str) -> bytes:
    with open(path, "rb") as file:
        return decompressed(file, compression).read()


@pytest.mark.parametrize("compression", COMPRESS)
@given(parts=st.lists(st.binary(max_size=60), min_size=1, max_size=5))
def test_members_one_behind_the_other_are_read_to_the_last(
    tmp_path_factory: pytest.TempPathFactory, compression: str, parts: list[bytes]
) -> None:
    path = tmp_path_factory.mktemp("members") / "a"
    path.write_bytes(b"".join(map(COMPRESS[compression], parts)))
    assert read(path, compression) == b"".join(parts)


@pytest.mark.parametrize("compression", COMPRESS)
def test_what_is_cut_short_or_goes_on_as_something_else_is_no_end(
    tmp_path: Path, compression: str
) -> None:
    member, path = COMPRESS[compression](TEXT), tmp_path / "a"
    for whole in (member, member * 3):
        for lost in (1, 2, 5, 9, len(member) // 2, len(member) - 2):
            path.write_bytes(whole[:-lost])
            with pytest.raises(BROKEN):
                read(path, compression)
        for rest in (b"{}\n", b"\0\0 and more", member[:1]):
            path.write_bytes(whole + rest)
            with pytest.raises(BROKEN):
                read(path, compression)
        path.write_bytes(whole + bytes(8))  # xz pads to four bytes, tapes to blocks
        assert read(path, compression) == TEXT * (len(whole) // len(member))
    path.write_bytes(b"")
    with pytest.raises(EOFError, match="0 bytes"):
        read(path, compression)


def zstd_frame(content: bytes, *, window_log: int) -> bytes:
    """A frame of one raw block that asks for a window of so many bits."""
    header = bytes([0, (window_log - 10) << 3])  # no size, no checksum; RFC 8878, 3.1.1.1.2
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    return b"\x28\xb5\x2f\xfd" + header + block + content


def test_zstd_reads_long_windows_skippable_frames_and_any_level(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    skippable = b"\x50\x2a\x4d\x18\x05\0\0\0notes"
    frames = [
        zstd_frame(b"window ", window_log=31),
        skippable,
        zstd_frame(b"of any size ", window_log=10),
        zstd.compress(b""),
        zstd.compress(TEXT, 19),
        skippable,
    ]
    path.write_bytes(b"".join(frames))
    assert read(path, "zst") == b"window of any size " + TEXT
    with pytest.raises(zstd.ZstdError):
        zstd.decompress(frames[0])  # without being told so, it refuses


def test_a_little_that_is_compressed_to_less_is_not_held_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(zstd.compress(bytes(1 << 26)))
    with open(path, "rb") as file:
        stream = decompressed(file, "zst")
        assert [len(stream.read(1 << 20)) for _ in range(65)] == [1 << 20] * 64 + [0]
