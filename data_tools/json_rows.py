"""JSON as corpora hold it: an object a line, or values of any layout, one behind the other.

The second kind is arrays, on one line or many, and printed objects; arrays are opened one level,
so their elements are the rows. It is read as a stream: what is held is one value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import orjson

from data_tools.rows import BLANK_LINES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1 << 20
_SMALLEST_ROUNDED = 2.0**63
_SURROGATE = re.compile("[\ud800-\udfff]")
_ARRAY = re.compile(rb'\[\s*(?:[\[\]{"\d]|-\d|-?Infinity\b|true\b|false\b|null\b|NaN\b)')
_BETWEEN = re.compile(rb"(?:[\s,]|\xef\xbb\xbf)*+")
_SCALAR = re.compile(rb'[^\s,\[\]{}"]++')
_TO_BRACKET = re.compile(rb'[^"\[\]{}]*+')
_TO_QUOTE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_QUOTE, _OPENING, _CLOSING = b'"'[0], b"[{", b"]}"


def parse_json(line: bytes, exact: Sequence[str] = ()) -> tuple[dict[str, Any] | str, bool]:
    """The object in some bytes, or the reason there is none; and whether it had to be mended.

    Whatever Python's own ``json`` reads is read: NaN, Infinity, numbers of any size, a byte order
    mark. Lone surrogates, which it reads and nothing can write, become U+FFFD: that is mending.
    ``exact`` names fields whose integers must not lose digits.
    """
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError:
        return _parse_as_python(line)
    if not isinstance(content, dict):
        return "not a JSON object", False
    for name in exact:
        if _may_be_rounded(content.get(name, content.get(name.partition(".")[0]))):
            return _parse_as_python(line)
    return content, False


def _may_be_rounded(value: Any) -> bool:
    """Whether there is a float that may have been an integer: orjson has none beyond 64 bits."""
    if type(value) is float:
        return abs(value) >= _SMALLEST_ROUNDED
    if type(value) is list:
        return any(map(_may_be_rounded, value))
    return type(value) is dict and any(map(_may_be_rounded, value.values()))


def _parse_as_python(line: bytes) -> tuple[dict[str, Any] | str, bool]:
    if not line.strip():
        return BLANK_LINES, False
    try:
        text = line.decode("utf-8-sig", "surrogatepass")
        content = json.loads(text)
        if not isinstance(content, dict):
            return "not a JSON object", False
        if "\\ud" not in text.lower() and not _SURROGATE.search(text):
            return content, False
        mended = _without_surrogates(content)
        return mended, mended != content
    except UnicodeDecodeError:
        return "invalid UTF-8", False
    except ValueError:
        return "invalid JSON", False
    except RecursionError:
        return "nested too deeply", False


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {_without_surrogates(k): _without_surrogates(item) for k, item in value.items()}
    return value


def is_json_lines(head: bytes) -> bool:
    """Whether a file that begins so is an object a line, where damage ends with its line."""
    head = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    if head.startswith(b"["):
        return not _ARRAY.match(head)
    first, _, rest = head.partition(b"\n")
    if not head.startswith(b"{") or isinstance(parse_json(first)[0], dict):
        return True
    text = head.decode("utf-8", "replace")
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        # Longer than the head, or damaged; a line of JSON lines never begins with a string.
        return not rest.lstrip().startswith(b'"')
    return "\n" not in text[:end] and not text[end:].lstrip().startswith("{")


class JsonValues:
    """The values of a stream: (byte offset, length, bytes; None for more than ``max_bytes``).

    Values are told apart by brackets and quotes alone, so a bad one does not hide the next.
    Raises ``EOFError`` where the stream ends inside a value or an array.
    """

    def __init__(self, stream: BinaryIO, *, max_bytes: int, offset: int = 0) -> None:
        self._stream, self._max_bytes = stream, max_bytes
        self._data = b""
        self._offset = offset  # of the data in the stream
        self._start = self._at = 0  # of the value, and of what comes next, in the data

    def __iter__(self) -> Iterator[tuple[int, int, bytes | None]]:
        in_array = False
        while (byte := self._next_byte()) is not None:
            if (byte == b"[" and not in_array) or (byte == b"]" and in_array):
                in_array = not in_array
                self._at += 1
            else:
                yield self._value(byte[0])
        if in_array:
            raise EOFError("the file ends inside a JSON array")

    def _next_byte(self) -> bytes | None:
        """The first byte of the next value or bracket, left where it is; None at the end."""
        while True:
            match = _BETWEEN.match(self._data, self._at)
            assert match is not None
            self._start = self._at = match.end()
            if self._at < len(self._data):
                return self._data[self._at : self._at + 1]
            if not self._read_on():
                return None

    def _value(self, byte: int) -> tuple[int, int, bytes | None]:
        first = self._offset + self._start
        if byte in _OPENING or byte == _QUOTE:
            self._pass_nested()
        elif byte in _CLOSING:  # one too many
            self._at += 1
        else:
            self._pass_scalar()
        length = self._offset + self._at - first
        value = self._data[self._start : self._at] if length <= self._max_bytes else None
        self._start = self._at
        return first, length, value

    def _pass_nested(self) -> None:
        depth, in_string = 0, False
        while True:
            match = (_TO_QUOTE if in_string else _TO_BRACKET).match(self._data, self._at)
            assert match is not None
            self._at = match.end()
            byte = self._data[self._at] if self._at < len(self._data) else None
            if byte is None or (in_string and byte != _QUOTE):  # a backslash, the last byte read
                if not self._read_on():
                    raise EOFError("the file ends inside a JSON value")
                continue
            self._at += 1
            if byte == _QUOTE:
                in_string = not in_string
            else:
                depth += 1 if byte in _OPENING else -1
            if depth <= 0 and not in_string:
                return

    def _pass_scalar(self) -> None:
        while match := _SCALAR.match(self._data, self._at):
            self._at = match.end()
            if self._at < len(self._data) or not self._read_on():
                return

    def _read_on(self) -> bool:
        """Read a chunk more; of a value that is too long, what was passed is let go."""
        chunk = self._stream.read(_CHUNK_BYTES)
        if self._at - self._start > self._max_bytes:
            self._start = self._at
        self._offset += self._start
        self._data = self._data[self._start :] + chunk
        self._at, self._start = self._at - self._start, 0
        return bool(chunk)
