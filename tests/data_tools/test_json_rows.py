"""JSON of every layout gives what Python's own json reads, and no damage hides the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import json_rows
from data_tools.corpus import plan_units
from data_tools.formats import open_rows
from data_tools.json_rows import is_json_lines, parse_json
from data_tools.rows import DamagedFile, Row

texts = st.text(st.characters(), max_size=12)  # lone surrogates too
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(texts, values, max_size=4)
rows_of_text = st.fixed_dictionaries({"text": texts}, optional={"a": values, "b": values})


def without_surrogates(value: Any) -> Any:
    """What is expected of a value, by another way than the code's."""
    if isinstance(value, str):
        return "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in value)
    if isinstance(value, list):
        return [without_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {without_surrogates(k): without_surrogates(v) for k, v in value.items()}
    return value


def rows_of(path: Path, *, max_bytes: int = 1 << 20, unit_bytes: int = 1 << 20) -> list[Row]:
    units = plan_units([path], unit_bytes=unit_bytes, by_line=False, options_key="")
    spans = [span for unit in units for span in unit.spans]
    fields = ("a", "b")
    return [row for span in spans for row in open_rows(span, fields=fields, max_bytes=max_bytes)]


@given(content=objects, ensure_ascii=st.booleans())
def test_what_python_reads_is_read_and_lone_surrogates_are_mended(
    content: dict[str, Any], ensure_ascii: bool
) -> None:
    written = json.dumps(content, ensure_ascii=ensure_ascii).encode("utf-8", "surrogatepass")
    found, is_mended = parse_json(written, tuple(content))
    read = json.loads(json.dumps(content))
    expected = without_surrogates(read)
    assert repr(found) == repr(expected)  # NaN is equal to NaN so, and 1 is not 1.0
    assert is_mended == (repr(read) != repr(expected))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        (b'{"a": NaN, "b": -Infinity, "c": 1e999}', {"a": math.nan, "b": -math.inf, "c": math.inf}),
        (b'{"a": "\\ud83d"}', {"a": "\ufffd"}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "\U0001f600"}),
        (b'{"a": "\xed\xa0\xbd"}', {"a": "\ufffd"}),
        (b'{"a": 1, "a": 2}', {"a": 2}),
        (b'{"a": 340282366920938463463374607431768211456}', {"a": 2**128}),
        (b'\xef\xbb\xbf{"a": 1}\r\n', {"a": 1}),
        (b'{"a": "\\u0000"}', {"a": "\0"}),
        (b'{"a": "\0"}', "invalid JSON"),
        (b'{"a": 1} {"a": 2}', "invalid JSON"),
        (b"\0\0\0\0", "invalid JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"a": ' + b"9" * 5_000 + b"}", "invalid JSON"),  # Python's json refuses that too
        (b" \r\n", "blank lines"),
        (b'{"a": "\xff"}', "invalid UTF-8"),
        (b"[{}]", "not a JSON object"),
    ],
)
def test_single_lines(line: bytes, found: dict[str, Any] | str) -> None:
    assert repr(parse_json(line, ("a",))[0]) == repr(found)


LAYOUTS = ("array", "lines of array", "printed array", "printed", "side by side", "lines", "CR")


def written(contents: list[dict[str, Any]], layout: str) -> str:
    match layout:
        case "array":
            return json.dumps(contents)
        case "lines of array":
            return "[" + ",\n".join(map(json.dumps, contents)) + "]\n"
        case "printed array":
            return json.dumps(contents, indent=2)
        case "printed":
            return "\n".join(json.dumps(content, indent=1) for content in contents)
        case "side by side":
            return "".join(map(json.dumps, contents))
        case "CR":
            return "\r".join(map(json.dumps, contents))
        case _:
            return "\n".join(map(json.dumps, contents))


@pytest.mark.parametrize("layout", LAYOUTS)
@given(
    contents=st.lists(rows_of_text, min_size=1, max_size=5),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
    chunk_bytes=st.sampled_from([1, 7, 1 << 20]),
)
@settings(max_examples=40)
def test_every_layout_gives_every_value_once(
    tmp_path_factory: pytest.TempPathFactory,
    layout: str,
    contents: list[dict[str, Any]],
    mark: bytes,
    chunk_bytes: int,
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = mark + written(contents, layout).encode()
    path.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", chunk_bytes)
        for unit_bytes in (1 << 20, 16):  # a file that would be cut were it of lines
            rows = rows_of(path, unit_bytes=unit_bytes)
            expected = [without_surrogates(content) for content in contents]
            assert repr([row.content for row in rows]) == repr(expected)
    for row, content in zip(rows, contents, strict=True):
        assert row.byte_offset is not None
        assert text[row.byte_offset :].startswith(b"{")
        if layout != "lines":
            assert [row.line for row in rows] == list(range(1, len(contents) + 1)), content


def test_a_bad_value_of_an_array_does_not_hide_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    long = b'{"text": "' + b'a long one with \\" and ] }' * 40 + b'"}'
    path.write_bytes(
        b'[{"text": "one"}, {"text": bad}, "two", 3, [{"text": "four"}], {"text": "\xff"},\n'
        b"null {'text'}, " + long + b', {"text": "\\ud800"}, {"text": "last"}] ]'
    )
    rows = rows_of(path, max_bytes=200)
    assert [row.content for row in rows] == [
        {"text": "one"},
        "invalid JSON",
        "not a JSON object",
        "not a JSON object",
        "not a JSON object",
        "invalid UTF-8",
        "not a JSON object",
        "invalid JSON",
        "longer than 200 bytes",
        {"text": "\ufffd"},
        {"text": "last"},
        "invalid JSON",
    ]
    assert [row.line for row in rows if row.is_mended] == [10]


def test_values_longer_than_allowed_are_passed_without_being_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 64)
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "' + b'\\"]}' * 10_000 + b'"},\n{"text": "next"}]')
    with open(path, "rb") as stream:
        found = json_rows.JsonValues(stream, max_bytes=100)
        largest = 0
        contents = []
        for offset, length, value in found:
            largest = max(largest, len(found._data))
            contents.append((offset, length, value))
    assert contents == [(1, 40_012, None), (40_015, 16, b'{"text": "next"}')]
    assert largest < 300


@pytest.mark.parametrize(
    "text",
    ['[{"text": "a"}, {"text": "b', '[{"text": "a"},\n', '{\n "text": "a', '{\n"a": {"b": 1}'],
)
def test_what_ends_inside_is_damaged_and_not_a_bad_row(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DamagedFile, match="the file ends inside a JSON"):
        rows_of(path)


@pytest.mark.parametrize(
    ("head", "lines"),
    [
        (b'{"a": 1}\n{"a": 2}\n', True),
        (b'{"a": "cut sh\n{"a": 2}\n', True),  # a bad first row costs one row
        (b'{"a": 1,\n{"a": 2}\n', True),
        (b'{"a": 1} rest\n{"a": 2}\n', True),
        (b"garbage\n", True),
        (b"[INFO] starting\n{}\n", True),
        (b"", True),
        (b'{"a": "' + b"x" * 70_000, True),
        (b'{"a": 1}{"a": 2}\n', False),
        (b'{\n  "a": 1\n}\n', False),
        (b'{"a": 1,\n "b": 2}', False),
        (b'{\n "a": "' + b"x" * 70_000, False),
        (b"[]", False),
        (b'[\r\n  {"a": 1}\r\n]', False),
        (b'["text"]', False),
    ],
)
def test_layouts_are_told_apart(head: bytes, lines: bool) -> None:
    assert is_json_lines(head[: 1 << 16]) == lines
    assert is_json_lines(b"\xef\xbb\xbf \n" + head[: 1 << 16]) == lines


@pytest.mark.parametrize(
    "encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]
)
@pytest.mark.parametrize("unit_bytes", [8, 1 << 20])
def test_other_encodings_are_refused_with_the_way_out(
    tmp_path: Path, encoding: str, unit_bytes: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"text": "one"}\n{"text": "two"}\n'.encode(encoding))
    with pytest.raises(DamagedFile, match=rf"a\.jsonl: is {encoding[:6].upper()}, .*iconv"):
        rows_of(path, unit_bytes=unit_bytes)
    text = tmp_path / "a.txt"
    text.write_text("plain", encoding="utf-16")
    with pytest.raises(DamagedFile, match=r"a\.txt: is UTF-16"):
        rows_of(text)


@pytest.mark.parametrize("unit_bytes", [8, 1 << 20])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, unit_bytes: int) -> None:
    mark = b"\xef\xbb\xbf"
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(mark + b'{"text": "a"}\r\n' + mark + b'{"text": "b"}\r\n')  # two, joined
    assert [row.content for row in rows_of(lines, unit_bytes=unit_bytes)] == [
        {"text": "a"},
        {"text": "b"},
    ]
    text = tmp_path / "a.txt"
    text.write_bytes(mark + b"river \xef\xbb\xbf\nstone")
    assert [row.content for row in rows_of(text)] == [{"text": "river \ufeff\nstone"}]
    units = plan_units([text], unit_bytes=unit_bytes, by_line=True, options_key="")
    rows = [
        row
        for unit in units
        for span in unit.spans
        for row in open_rows(span, fields=(), max_bytes=100)
    ]
    assert [row.content for row in rows] == [{"text": "river \ufeff"}, {"text": "stone"}]
