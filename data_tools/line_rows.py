"""Rows of files that hold text as it is: JSON, lines, and files that are one document."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from data_tools.decompression import BUFFER_BYTES, decompressed
from data_tools.json_rows import BYTE_ORDER_MARK, JsonValues, is_json_lines, parse_json
from data_tools.rows import BLANK_LINES, DamagedFile, Row, Span

_HEAD_BYTES = 1 << 16
_OTHER_ENCODINGS = {  # by their mark, or by how JSON in them must begin; the longer first
    "UTF-32": re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff|[\[{]\0\0\0|\0\0\0[\[{]"),
    "UTF-16": re.compile(rb"\xff\xfe|\xfe\xff|[\[{]\0[^\0]\0|\0[\[{]\0[^\0]"),
}
Parsed = tuple[dict[str, Any] | str, bool]


def read_lines(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """Rows of a span of JSON lines or text by line; of a file of other JSON, all its values."""
    with open(span.file, "rb", buffering=BUFFER_BYTES) as file:
        is_json = span.format.kind == "jsonl"
        head = decompressed(file, span.format.compression).read(_HEAD_BYTES)
        _check_encoding(span.file, head)
        file.seek(0)
        stream = decompressed(file, span.format.compression)
        parse = _json_parser(fields) if is_json else _parse_text
        mark_bytes = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
        if is_json and span.end is None and not is_json_lines(head):
            first = len(stream.read(mark_bytes))
            values = JsonValues(stream, max_bytes=max_bytes, offset=first)
            yield from _values(file, values, parse=parse, max_bytes=max_bytes)
        else:
            first = (
                _skip_to_line(stream, span.first) if span.first else len(stream.read(mark_bytes))
            )
            yield from _lines(span, file, stream, first=first, parse=parse, max_bytes=max_bytes)


def can_be_cut(file: str, *, is_json: bool) -> bool:
    """Whether a plain file is made of lines. Raises ``DamagedFile`` for what is not UTF-8."""
    with open(file, "rb") as stream:
        head = stream.read(_HEAD_BYTES)
    _check_encoding(file, head)
    return not is_json or is_json_lines(head)


def _check_encoding(file: str, head: bytes) -> None:
    for name, beginning in _OTHER_ENCODINGS.items():
        if beginning.match(head):
            raise DamagedFile(
                f"{file}: is {name}, not UTF-8; write it anew, as by `iconv -f {name} -t UTF-8`, "
                "and run the same command again"
            )


def _lines(
    span: Span,
    file: BinaryIO,
    stream: BinaryIO,
    *,
    first: int,
    parse: Callable[[bytes], Parsed],
    max_bytes: int,
) -> Iterator[Row]:
    offset = first
    read_at, number = file.tell() if stream is not file else span.first, 0
    while span.end is None or offset < span.end:
        line = stream.readline(max_bytes + 1)
        if not line:
            break
        number += 1
        content: dict[str, Any] | str
        is_mended, length = False, len(line)
        if length > max_bytes and not line.endswith(b"\n"):
            length += _skip_line(stream)
            content = f"longer than {max_bytes:,} bytes"
        else:
            content, is_mended = parse(line)
        now_at = offset + length if stream is file else file.tell()
        yield Row(number, now_at - read_at, content, offset, is_mended)
        read_at = now_at
        offset += length


def _values(
    file: BinaryIO, values: JsonValues, *, parse: Callable[[bytes], Parsed], max_bytes: int
) -> Iterator[Row]:
    read_at = 0
    for number, (offset, _, value) in enumerate(values, start=1):
        content: dict[str, Any] | str = f"longer than {max_bytes:,} bytes"
        is_mended = False
        if value is not None:
            content, is_mended = parse(value)
        now_at = file.tell()
        yield Row(number, now_at - read_at, content, offset, is_mended)
        read_at = now_at


def _skip_to_line(stream: BinaryIO, first: int) -> int:
    """Go to the first line that starts at ``first`` or later; where that is."""
    stream.seek(first - 1)
    return first - 1 + _skip_line(stream)


def _skip_line(stream: BinaryIO) -> int:
    """Read to the end of a line, in pieces; how many bytes that took."""
    skipped = 0
    while piece := stream.readline(BUFFER_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _json_parser(fields: Sequence[str]) -> Callable[[bytes], Parsed]:
    """The text alone cannot be a number; other fields can."""
    if len(fields) < 2:
        return parse_json
    return lambda line: parse_json(line, fields)


def _parse_text(line: bytes) -> Parsed:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return "invalid UTF-8", False
    return ({"text": text} if text.strip() else BLANK_LINES), False


def read_document(span: Span, fields: Sequence[str], max_bytes: int) -> Iterator[Row]:
    """A file as one row."""
    with open(span.file, "rb") as file:
        content = decompressed(file, span.format.compression).read(max_bytes + 1)
        _check_encoding(span.file, content)
        if content:
            yield Row(1, span.num_bytes, text_document(content, max_bytes), 0)


def text_document(content: bytes, max_bytes: int) -> dict[str, Any] | str:
    """The text of a whole file as a field, or the reason there is none."""
    if len(content) > max_bytes:
        return f"longer than {max_bytes:,} bytes"
    try:
        return {"text": content.removeprefix(BYTE_ORDER_MARK).decode()}
    except UnicodeDecodeError:
        return "invalid UTF-8"
