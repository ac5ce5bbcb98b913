"""Every format gives the same documents, in whatever parts it is read."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus import plan_units
from data_tools.formats import open_rows
from data_tools.input_files import find_files
from data_tools.rows import DamagedFile, Row
from megatron_curr.data.shards import open_shards
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, everything_in, run, write_jsonl

ROWS = [
    {"text": text, "id": number, "url": f"http://e.org/{number}"}
    for number, text in enumerate(TEXTS)
]


def rows_of(folder: Path, unit_bytes: int, *, by_line: bool = False) -> list[Row]:
    files = find_files([folder]).files
    units = plan_units(files, unit_bytes=unit_bytes, by_line=by_line, options_key="")
    return [
        row
        for unit in units
        for span in unit.spans
        for row in open_rows(span, fields=("text", "id"), max_bytes=1 << 20)
    ]


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith(".gz") else "w") as archive:
        for number, row in enumerate(ROWS):
            for suffix, content in (
                ("json", json.dumps({"id": row["id"]}).encode()),
                ("jpg", b"\xff\xd8"),
                ("txt", row["text"].encode()),
            ):
                member = tarfile.TarInfo(f"a/{number:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def write_format(folder: Path, name: str) -> None:
    folder.mkdir()
    path, table = folder / name, pa.Table.from_pylist(ROWS)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    match name.partition(".")[2]:
        case "jsonl":
            path.write_bytes(lines)
        case "jsonl.gz":
            path.write_bytes(gzip.compress(lines))
        case "jsonl.zst":
            half = len(lines) // 2  # two frames, as several writers leave them
            frames = (lines[:half], lines[half:])
            path.write_bytes(b"".join(pa.compress(part, "zstd", asbytes=True) for part in frames))
        case "parquet":
            pq.write_table(table, path, row_group_size=20)
        case "arrow":
            new = pa.ipc.new_file if name.startswith("file") else pa.ipc.new_stream
            with new(str(path), table.schema) as writer:
                writer.write_table(table, max_chunksize=20)
        case "tar" | "tar.gz":
            write_tar(path)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow", "stream.arrow", "a.tar"],
)
def test_every_format_gives_every_row_once(tmp_path: Path, name: str) -> None:
    write_format(tmp_path / "in", name)
    for unit_bytes in (1, 3_000, 1 << 30):
        rows = rows_of(tmp_path / "in", unit_bytes)
        assert [row.content["text"] for row in rows] == TEXTS
        assert [row.content["id"] for row in rows] == list(range(len(TEXTS)))
    files = find_files([tmp_path]).files
    parts = plan_units(files, unit_bytes=3_000, by_line=False, options_key="")
    assert (len(parts) > 2) == (name in ("a.jsonl", "a.parquet", "file.arrow"))


@given(
    lines=st.lists(st.binary(max_size=30).map(lambda b: b.replace(b"\n", b"")), max_size=12),
    unit_bytes=st.integers(1, 50),
    ends_with_newline=st.booleans(),
)
@settings(max_examples=60)
def test_parts_of_a_file_read_each_line_once(
    tmp_path_factory: pytest.TempPathFactory,
    lines: list[bytes],
    unit_bytes: int,
    ends_with_newline: bool,
) -> None:
    folder = tmp_path_factory.mktemp("lines")
    # The mark in front keeps what follows from being JSON of another layout, or UTF-16.
    content = b"#" + b"\n".join(lines) + (b"\n" if ends_with_newline else b"")
    (folder / "a.jsonl").write_bytes(content)
    offsets = [row.byte_offset for row in rows_of(folder, unit_bytes)]
    assert offsets == [row.byte_offset for row in rows_of(folder, 1 << 30)]
    starts = [0, *(at + 1 for at, byte in enumerate(content) if byte == ord("\n"))]
    assert offsets == [start for start in starts if start < len(content)]


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "file.arrow", "stream.arrow"),
        *("a.tar", "a.tar.gz"),
    ],
)
def test_a_file_cut_short_anywhere_is_named_and_no_row_is_lost_in_silence(
    tmp_path: Path, name: str
) -> None:
    write_format(tmp_path / "in", name)
    path = tmp_path / "in" / name
    content = path.read_bytes()
    for share in (0, 0.1, 0.3, 0.5, 0.7, 0.9):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DamagedFile, match=rf"{name}: cannot be read"):
            rows_of(tmp_path / "in", 1 << 30)
    path.write_bytes(content)
    assert len(rows_of(tmp_path / "in", 1 << 30)) == len(ROWS)


def test_tars_joined_into_one_file_are_not_taken_for_the_first(tmp_path: Path) -> None:
    write_format(tmp_path / "in", "a.tar")
    path = tmp_path / "in" / "a.tar"
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(DamagedFile, match="several tars in one file"):
        rows_of(tmp_path / "in", 1 << 30)


def test_text_files_are_documents_or_lines(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo\n")
    (folder / "b.txt.gz").write_bytes(gzip.compress(b"three\r\n\nfour"))
    rows = rows_of(folder, 1 << 20)
    assert rows[0].content == {"text": "one\ntwo\n"}
    texts = [row.content for row in rows_of(folder, 1, by_line=True)]
    assert texts == [
        {"text": "one"},
        {"text": "two"},
        {"text": "three"},
        "blank lines",
        {"text": "four"},
    ]


def test_formats_make_the_same_shards(tmp_path: Path) -> None:
    shards = []
    for name in ("a.jsonl", "a.parquet"):
        write_format(tmp_path / name, name)
        run([tmp_path / name], tmp_path / f"{name}_out" / "x", shard_tokens=900, unit_bytes=2_000)
        found = everything_in(tmp_path / f"{name}_out" / "x")
        shards.append({k: v for k, v in found.items() if k.endswith((".bin", ".idx"))})
    assert shards[0] == shards[1] and len(shards[0]) > 6


def test_globs_lists_and_bad_tables(tmp_path: Path) -> None:
    one, two = (write_jsonl(tmp_path / f"{n}.jsonl", TEXTS[:5]) for n in "ab")
    (tmp_path / "files.lst").write_text(f"{two}\n\n{one}\n")
    assert find_files([f"@{tmp_path}/files.lst"]).files == [two, one]
    assert find_files([f"{tmp_path}/[ab].jsonl"]).files == [one, two]
    table = pa.table(
        {"text": pa.array([b"fine", b"\xff", None]).cast(pa.binary()).view(pa.binary())}
    )
    bad = pa.table(
        {"text": pa.Array.from_buffers(pa.string(), 3, table["text"].chunk(0).buffers())}
    )
    pq.write_table(bad, tmp_path / "bad.parquet")
    summary = run([tmp_path / "bad.parquet"], tmp_path / "x", heldout_frac=0, max_rejected_frac=1.0)
    assert summary.rejects == {"field 'text' is null": 1, "invalid UTF-8": 1}
    assert open_shards(tmp_path / "x" / "train").num_documents == 1
    with pytest.raises(DataError, match="no column 'body'; it has text"):
        run([tmp_path / "bad.parquet"], tmp_path / "y", text_field="body")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(DataError, match=r"torn\.parquet: cannot be read"):
        run([tmp_path / "torn.parquet"], tmp_path / "y")


def test_a_mended_small_file_moves_no_other_unit(tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{n:03}.jsonl", TEXTS[:3]) for n in range(200)]
    size = files[0].stat().st_size

    def keys() -> list[str]:
        units = plan_units(files, unit_bytes=8 * size, by_line=False, options_key="")
        assert max(len(unit.spans) for unit in units) <= 4 * 8 + 1
        return [unit.key for unit in units]

    before = keys()
    assert 10 < len(before) < 50
    write_jsonl(files[100], TEXTS[:4])
    assert len(set(before).difference(keys())) == 1
