"""Reading shards: equal to megatron-core's reader, and clear about files that are damaged."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import astuple
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_curr.data.idx_format import (
    bin_path,
    idx_path,
    map_bytes,
    masked_path,
    token_dtype,
)
from megatron_curr.data.manifest import Manifest, write_manifest
from megatron_curr.data.shards import ShardWriter, check_vocabulary, open_shards
from megatron_curr.errors import DataError
from tests.data.corpora import write_shard

torch = pytest.importorskip("torch")

from megatron.core.datasets.indexed_dataset import (  # noqa: E402 - after the torch check
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)

DTYPES = [np.uint8, np.int16, np.uint16, np.int32, np.int64]
# A document is a list of sequences; both may be empty.
documents = st.lists(
    st.lists(st.lists(st.integers(0, 120), max_size=6), max_size=3), min_size=1, max_size=12
)


def build_with_megatron(prefix: Path, corpus: list[list[list[int]]], dtype: type) -> None:
    builder = IndexedDatasetBuilder(str(bin_path(prefix)), dtype=dtype)
    for document in corpus:
        flat = [token for sequence in document for token in sequence]
        builder.add_document(torch.tensor(flat), [len(sequence) for sequence in document])
    builder.finalize(str(idx_path(prefix)))


@given(st.lists(documents, min_size=1, max_size=3), st.sampled_from(DTYPES), st.data())
@settings(max_examples=60)
def test_windows_and_spans_equal_megatrons_reader(corpora, dtype, data) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for number, corpus in enumerate(corpora):
            build_with_megatron(root / f"part_{number}", corpus, dtype)
        flat = [[[t for s in doc for t in s] for doc in corpus] for corpus in corpora]
        stream = [token for corpus in flat for document in corpus for token in document]
        if not stream:
            with pytest.raises(DataError, match="not one token"):
                open_shards(folder)
            return
        shards = open_shards(folder)
        assert shards.num_tokens == len(stream)
        assert shards.num_documents == sum(map(len, corpora))
        assert shards.dtype == dtype
        assert_equal_to_megatron(root, corpora, dtype)
        first = data.draw(st.integers(0, len(stream) - 1))
        count = data.draw(st.integers(0, len(stream) - first))
        assert shards.read(first, count).tolist() == stream[first : first + count]
        spans = shards.spans(first, count)
        assert sum(span.num_tokens for span in spans) == count
        tokens: list[int] = []
        starts = []
        for span in spans:
            document = flat[int(span.shard.removeprefix("part_"))][span.document]
            if span.first_token == 0:
                starts.append(len(tokens))
            tokens += document[span.first_token : span.first_token + span.num_tokens]
            begin, length = shards.document_range(span.shard, span.document)
            assert stream[begin : begin + length] == document
        assert tokens == stream[first : first + count]
        assert shards.document_starts(first, count).tolist() == starts


def assert_equal_to_megatron(root: Path, corpora: list[list[list[list[int]]]], dtype: type) -> None:
    """Sequence by sequence, where megatron-core can open the file: it maps no empty one."""
    for number in range(len(corpora)):
        prefix = root / f"part_{number}"
        if not bin_path(prefix).stat().st_size:
            continue
        theirs = IndexedDataset(str(prefix))
        ours = open_shards(prefix)
        position = 0
        for sequence in range(len(theirs)):
            expected = theirs[sequence]
            assert ours.read(position, len(expected)).tolist() == expected.tolist()
            position += len(expected)
        assert position == ours.num_tokens


@given(
    st.lists(st.lists(st.integers(0, 60_000), max_size=30), min_size=1, max_size=20),
    st.sampled_from([np.uint16, np.int32]),
)
@settings(max_examples=40)
def test_writer_makes_the_bytes_of_megatrons_builder(corpus, dtype) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        build_with_megatron(root / "theirs", [[document] for document in corpus], dtype)
        write_shard(root / "ours", corpus, dtype)
        for path_of in (bin_path, idx_path):
            assert path_of(root / "ours").read_bytes() == path_of(root / "theirs").read_bytes()
        with ShardWriter(root / "at_once", np.dtype(dtype)) as writer:
            flat = [token for document in corpus for token in document]
            writer.add_documents(flat, [len(document) for document in corpus])
        assert idx_path(root / "at_once").read_bytes() == idx_path(root / "ours").read_bytes()
        assert bin_path(root / "at_once").read_bytes() == bin_path(root / "ours").read_bytes()


def test_the_token_type_is_the_one_megatron_takes() -> None:
    for vocab_size in (1, 65_499, 65_500, 65_536, 70_000, 2**31):
        assert token_dtype(vocab_size) == DType.optimal_dtype(vocab_size)


def manifest_of(folder: Path, documents_of: dict[str, list[list[int]]]) -> Manifest:
    records = []
    for name, corpus in documents_of.items():
        with ShardWriter(folder / name, np.dtype(np.uint16)) as writer:
            for document in corpus:
                writer.add_document(document)
        assert writer.record is not None
        records.append(writer.record)
    manifest = Manifest("uint16", None, tuple(records))
    write_manifest(folder, manifest)
    return manifest


@given(st.sampled_from([".bin", ".idx"]), st.floats(0, 1, exclude_max=True), st.booleans())
@settings(max_examples=60)
def test_a_file_cut_short_anywhere_is_named(suffix, at, with_manifest) -> None:
    with TemporaryDirectory() as folder:
        root = Path(folder)
        corpus = [[1, 2, 3], [], [4], [5, 6, 7, 8]]
        if with_manifest:
            manifest_of(root, {"a": corpus})
        else:
            write_shard(root / "a", corpus)
        path = root / f"a{suffix}"
        os.truncate(path, int(path.stat().st_size * at))
        with pytest.raises(DataError, match="again") as caught:
            open_shards(folder)
        assert f"{root / 'a'}." in str(caught.value)


def test_a_list_of_masked_tokens_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "a", [[1, 2], [3]], masked=[1])
    assert open_shards(tmp_path).masked_spans(0, 3) == [(0, 1)]
    os.truncate(masked_path(prefix), 4)
    with pytest.raises(DataError, match=r"a\.masked: 4 bytes, but 2 documents need 8.*again"):
        open_shards(tmp_path)
    with ShardWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_documents([1, 2, 3], [2, 1], masked=np.array([0, 1]))
    assert writer.record is not None and writer.record.masked_sha256
    write_manifest(tmp_path, Manifest("uint16", None, (writer.record,)))
    assert open_shards(tmp_path).masked_spans(1, 2) == [(1, 2)]
    masked_path(prefix).unlink()
    with pytest.raises(DataError, match=r"a\.masked: no such file"):
        open_shards(tmp_path)


def test_a_shard_written_over_leaves_no_masked_tokens_behind(tmp_path: Path) -> None:
    prefix = write_shard(tmp_path / "a", [[1, 2], [3]], masked=[1])
    write_shard(prefix, [[1, 2], [3]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]
    assert not open_shards(tmp_path).has_masked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PAR1" + bytes(100), "not a Megatron .idx file"),
        (b"", "0 bytes, less than the header's 34: the file is cut short"),
        (b"MMIDIDX\x00\x00" + bytes(3), "cut short"),
        (b"MMIDIDX\x00\x00" + (2).to_bytes(8, "little") + bytes(17), "version 2"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x63" + bytes(16), "code 99"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08" + bytes(16), "empty document"),
    ],
)
def test_a_foreign_index_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_shard(tmp_path / "a", [[1, 2]])
    idx_path(tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_shards(tmp_path)
    assert "a.idx" in str(caught.value)


def test_a_bin_of_another_shard_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1, 2]])
    write_shard(tmp_path / "b", [[1, 2, 3]])
    os.replace(bin_path(tmp_path / "b"), bin_path(tmp_path / "a"))
    with pytest.raises(DataError, match=r"a\.bin: 6 bytes, but a\.idx counts 4.*longer"):
        open_shards(tmp_path / "a")


def test_missing_things_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither a folder nor a shard"):
        open_shards(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no \.bin/\.idx shard in this folder"):
        open_shards(tmp_path)
    write_shard(tmp_path / "prose" / "a", [[1]])
    with pytest.raises(DataError, match=r"there are some in .*prose"):
        open_shards(tmp_path)
    with pytest.raises(DataError, match="matches this glob"):
        open_shards(tmp_path / "x*")
    idx_path(tmp_path / "prose" / "a").unlink()
    with pytest.raises(DataError, match=r"a\.idx: no such file"):
        open_shards(tmp_path / "prose")


def test_folder_glob_prefix_and_file_name_open_the_same(tmp_path: Path) -> None:
    write_shard(tmp_path / "s" / "part.0", [[1, 2]])
    write_shard(tmp_path / "s" / "part.1", [[3]])
    for spec in ("s", "s/part.*", "s/*.idx", "s/part*.bin", "*"):
        assert open_shards(tmp_path / spec).read(0, 3).tolist() == [1, 2, 3], spec
    for spec in ("s/part.1", "s/part.1.bin", "s/part.1.idx"):
        assert open_shards(tmp_path / spec).read(0, 1).tolist() == [3], spec


def test_an_empty_source_is_refused_and_an_empty_shard_is_not(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [])
    write_shard(tmp_path / "b", [[], []])
    with pytest.raises(DataError, match="2 shards, 2 documents, but not one token"):
        open_shards(tmp_path)
    write_shard(tmp_path / "c", [[7, 8]])
    write_shard(tmp_path / "d", [[]])
    shards = open_shards(tmp_path)
    assert shards.read(0, 2).tolist() == [7, 8]
    assert [astuple(span) for span in shards.spans(0, 2)] == [("c", 0, 0, 2)]


def test_a_window_outside_the_stream_is_an_index_error(tmp_path: Path) -> None:
    shards = open_shards(write_shard(tmp_path / "a", [[1, 2, 3]]))
    for first, count in ((-1, 2), (2, 2), (3, 1), (9, 1)):
        with pytest.raises(IndexError, match=r"of .*which has 3"):
            shards.read(first, count)


def test_what_is_read_cannot_be_written_to(tmp_path: Path) -> None:
    shards = open_shards(write_shard(tmp_path / "a", [[1, 2, 3]]))
    with pytest.raises(ValueError, match="read-only"):
        shards.read(0, 2)[0] = 9


def test_the_manifest_tells_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    manifest_of(tmp_path, {"a": [[1, 2]], "b": [[3, 900]]})
    shards = open_shards(tmp_path)
    assert shards.max_token_id == 900
    check_vocabulary(shards, 901)
    with pytest.raises(DataError, match=r"b\.bin: holds token id 900, but the vocabulary has 900"):
        check_vocabulary(shards, 900)
    assert open_shards(write_shard(tmp_path / "c" / "a", [[1]])).max_token_id is None


def test_the_manifest_and_the_folder_must_agree(tmp_path: Path) -> None:
    manifest_of(tmp_path, {"a": [[1, 2]], "b": [[3]]})
    write_shard(tmp_path / "c", [[1]])
    with pytest.raises(DataError, match=r"c\.idx: is not in the manifest\.json"):
        open_shards(tmp_path)
    for path_of in (bin_path, idx_path):
        path_of(tmp_path / "c").unlink()
        path_of(tmp_path / "b").unlink()
    with pytest.raises(DataError, match=r"b\.bin: listed in manifest\.json but not there \(1 of 2"):
        open_shards(tmp_path)
    assert open_shards(tmp_path / "a").num_tokens == 2
    (tmp_path / "manifest.json").write_text('{"format": "megatron-curr sh')
    with pytest.raises(DataError, match="cannot be read"):
        open_shards(tmp_path)


def test_the_manifest_of_another_tool_is_left_alone(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1, 2]])
    (tmp_path / "manifest.json").write_text('{"files": []}')
    assert open_shards(tmp_path).num_tokens == 2


def test_an_index_that_belies_the_manifest_is_found_when_it_is_used(tmp_path: Path) -> None:
    manifest_of(tmp_path, {"a": [[1, 2], [3, 4]]})
    index = bytearray(idx_path(tmp_path / "a").read_bytes())
    index[18] = 9  # the number of sequences, with the file's size unchanged
    idx_path(tmp_path / "a").write_bytes(bytes(index))
    shards = open_shards(tmp_path)
    with pytest.raises(DataError, match=r"a\.idx"):
        shards.spans(0, 2)


def test_a_shard_that_changes_during_a_run_is_named(tmp_path: Path) -> None:
    shards = open_shards(write_shard(tmp_path / "a", [[1, 2, 3]]))
    write_shard(tmp_path / "a", [[1]])
    with pytest.raises(DataError, match="changed to 2 bytes"):
        shards.read(0, 1)


def test_a_window_over_two_types_takes_the_wider(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[65_000]], np.uint16)
    write_shard(tmp_path / "b", [[70_000]], np.int32)
    window = open_shards(tmp_path).read(0, 2)
    assert window.tolist() == [65_000, 70_000] and window.dtype == np.int32


def test_shards_of_one_name_in_two_folders_go_by_their_path(tmp_path: Path) -> None:
    write_shard(tmp_path / "x" / "text", [[1, 2]])
    write_shard(tmp_path / "y" / "text", [[3]])
    shards = open_shards(tmp_path / "*")
    names = [str(tmp_path / "x" / "text"), str(tmp_path / "y" / "text")]
    assert [span.shard for span in shards.spans(0, 3)] == names
    assert shards.document_range(names[1], 0) == (2, 1)
    with pytest.raises(DataError, match="no shard 'text'"):
        shards.document_range("text", 0)
    with pytest.raises(DataError, match="holds documents 0 to 0"):
        shards.document_range(names[1], 1)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match="70000 does not fit uint16"),
        ShardWriter(tmp_path / "a", np.dtype(np.uint16)) as writer,
    ):
        writer.add_document([1, 2])
        writer.add_document([70_000])
    assert list(tmp_path.iterdir()) == []


def test_five_thousand_shards_open_in_a_second_and_hold_no_descriptor(tmp_path: Path) -> None:
    write_shard(tmp_path / "s_00000", [[1, 2], [3]])
    for number in range(1, 5000):
        for path_of in (bin_path, idx_path):
            os.link(path_of(tmp_path / "s_00000"), path_of(tmp_path / f"s_{number:05d}"))
    started_at = time.process_time()
    shards = open_shards(tmp_path)
    assert time.process_time() - started_at < 1.5
    assert shards.num_tokens == 15_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        assert shards.read(0, 15_000).tolist() == [1, 2, 3] * 5000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_view_outlives_what_it_was_read_from(tmp_path: Path) -> None:
    path = bin_path(write_shard(tmp_path / "a", [list(range(4000))]))
    tail = map_bytes(path).view(np.uint16)[3000:]
    path.unlink()
    assert tail.tolist() == list(range(3000, 4000))
