"""Samples of webdataset tars."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from typing import Any

from data_tools.decompression import BUFFER_BYTES, decompressed
from data_tools.json_rows import parse_json
from data_tools.line_rows import text_document
from data_tools.rows import DamagedFile, Row, Span

# Members that are corpora themselves.
_UNPACKED = (".jsonl", ".ndjson", ".parquet", ".arrow", ".tar", ".gz", ".bz2", ".xz", ".zst")


def read_tar(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """Samples of a webdataset tar: neighbouring members whose names agree up to the first dot.

    ``.json`` gives fields, ``.txt`` the text; other members (pictures, ...) are passed over. Raises
    ``DamagedFile`` for members that are corpora themselves.
    """
    with (
        open(span.file, "rb", buffering=BUFFER_BYTES) as file,
        tarfile.open(fileobj=decompressed(file, span.format.compression), mode="r|") as archive,
    ):
        row: Row | None = None
        key, line, read_at = "", 0, 0
        for member in archive:
            if member.isdir():
                continue
            folder, _, name = member.name.rpartition("/")
            stem, _, suffix = name.partition(".")
            if name.endswith(_UNPACKED):
                raise DamagedFile(
                    f"{span.file}: holds {member.name}, but a tar is read as samples of .txt and "
                    ".json; unpack it, and give the folder"
                )
            if row is None or f"{folder}/{stem}" != key:
                if row is not None:
                    row.num_bytes, read_at = file.tell() - read_at, file.tell()
                    yield row
                line += 1
                key = f"{folder}/{stem}"
                row = Row(line, 0, {"__key__": key.lstrip("/")})
            if suffix in ("json", "txt"):
                _add_member(row, archive, member, suffix, max_bytes)
        if row is not None:
            row.num_bytes = max(span.num_bytes - read_at, 0)
            yield row
        _check_end(archive)


def _check_end(archive: tarfile.TarFile) -> None:
    """A tar ends with blocks of zeros, which tarfile does not insist on. Raises ``ReadError``."""
    stream = archive.fileobj
    assert stream is not None
    if stream.tell() - archive.offset < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no block of zeros at its end: the file is cut short")
    while rest := stream.read(BUFFER_BYTES):
        if rest.strip(b"\0"):
            raise tarfile.ReadError("goes on behind its end: several tars in one file")


def _add_member(
    row: Row, archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, max_bytes: int
) -> None:
    """Add the fields of one more member to its sample; a reason stays a reason."""
    if not isinstance(row.content, dict):
        return
    if not member.isfile():
        row.content = "a link in a tar"
        return
    if member.size > max_bytes:
        row.content = f"longer than {max_bytes:,} bytes"
        return
    stream = archive.extractfile(member)
    data = stream.read() if stream else b""
    added: dict[str, Any] | str
    is_mended = False
    if suffix == "json":
        added, is_mended = parse_json(data)
    else:
        added = text_document(data, max_bytes)
    row.content = added if isinstance(added, str) else {**row.content, **added}
    row.is_mended |= is_mended
