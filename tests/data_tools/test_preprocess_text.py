"""Preprocessing: megatron-core's own bytes, a stable split, no line lost in silence."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from data_tools.preprocess_text import Options, is_held_out, preprocess
from data_tools.train_tokenizer import train_tokenizer
from megatron_curr.cli import main
from megatron_curr.data import shard_writer
from megatron_curr.data.manifest import read_manifest
from megatron_curr.data.shards import open_shards
from megatron_curr.data.tokenizer import Tokenizer
from megatron_curr.errors import DataError

TEXTS = [f"Document {number} counts to {number + 3}.\n" * (number % 7 + 1) for number in range(200)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = write_jsonl(folder / "a.jsonl", TEXTS)
    return train_tokenizer([corpus], folder / "tokenizer.model", vocab_size=300)


def run(inputs: list[Path], output: Path, tokenizer: Tokenizer, **options: object):
    known = {"overwrite", "num_threads"} & options.keys()
    settings = {key: options.pop(key) for key in known}
    return preprocess(
        inputs,
        output,
        tokenizer=tokenizer.path,
        options=Options(**options),
        show_progress=False,
        **settings,
    )


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_document_is_there_once_with_its_eod(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_jsonl(tmp_path / "prose.jsonl", TEXTS)
    summary = run([corpus], tmp_path / "prose", tokenizer, heldout_frac=0.2, shard_tokens=900)
    found = []
    for split in ("train", "heldout"):
        shards = open_shards(tmp_path / "prose" / split)
        assert shards.num_tokens == summary.tokens[split]
        assert shards.num_documents == summary.documents[split]
        for shard in shards.shards:
            for document in range(shard.num_documents):
                ids = shards.read(*shards.document_range(shard.name, document)).tolist()
                assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
                found.append(tokenizer.decode(ids))
                assert is_held_out(found[-1], 0.2) == (split == "heldout")
    assert sorted(found) == sorted(TEXTS)
    assert 10 < summary.documents["heldout"] < 80
    sizes = [shard.num_tokens for shard in open_shards(tmp_path / "prose" / "train").shards]
    assert len(sizes) > 3 and all(900 <= size < 1100 for size in sizes[:-1])


def test_the_bytes_are_those_of_megatrons_builder(tmp_path: Path, tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run([corpus], tmp_path / "a", tokenizer, heldout_frac=0)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eod_id]
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours = tmp_path / "a" / "train" / f"a_train_00000{suffix}"
        assert ours.read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert not (tmp_path / "a" / "heldout").exists()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    outputs = [tmp_path / run_name / "a" for run_name in ("one", "two")]
    for threads, output in enumerate(outputs, start=1):
        run([corpus], output, tokenizer, shard_tokens=1500, num_threads=threads)
    assert everything_in(outputs[0]) == everything_in(outputs[1])


def test_the_split_stays_when_the_corpus_grows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    held_out = [is_held_out(text, 0.1) for text in TEXTS]
    assert 5 < sum(held_out) < 50
    assert [is_held_out(text, 0.3) for text in TEXTS].count(True) > sum(held_out)
    assert all(is_held_out(text, 0.3) for text in TEXTS if is_held_out(text, 0.1))


def test_bad_lines_are_counted_and_listed_and_the_next_is_read(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    lines = [
        b'{"text": "first"}',
        b"",
        b'{"text": ""}',
        b'{"body": "x"}',
        b'{"text": 3}',
        b"[1]",
        b'{"text": "\xff\xfe"}',
        b'{"text": "cut',
        b'{"text": "last </s> of all"}',
    ]
    corpus = tmp_path / "a.jsonl"
    corpus.write_bytes(b"\n".join(lines))
    summary = run([corpus], tmp_path / "a", tokenizer, heldout_frac=0)
    assert summary.documents["train"] == 2
    listed = [json.loads(line) for line in (tmp_path / "a" / "rejects.jsonl").open()]
    assert [(row["line"], row["reason"]) for row in listed] == [
        (2, "blank line"),
        (3, "empty text"),
        (4, "no field 'text'"),
        (5, "field 'text' is not text"),
        (6, "not a JSON object"),
        (7, "invalid UTF-8"),
        (8, "invalid JSON"),
    ]
    content = corpus.read_bytes()
    for row in listed:
        assert content[row["byte_offset"] :].startswith(lines[row["line"] - 1])
    assert sum(summary.rejects.values()) == 7
    assert "rejected lines: " in summary.text()
    manifest = read_manifest(tmp_path / "a" / "train")
    assert manifest is not None and manifest.tokenizer is not None
    assert manifest.tokenizer.sha256 == tokenizer.sha256
    assert manifest.options["rejected_lines"] == summary.rejects
    shards = open_shards(tmp_path / "a" / "train")
    assert tokenizer.decode(shards.read(0, shards.num_tokens).tolist()) == "firstlast </s> of all"


def test_wrong_input_writes_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    (tmp_path / "bad.jsonl").write_text("no json\n")
    (tmp_path / "folder").mkdir()
    for inputs, message in (
        ([tmp_path / "bad.jsonl"], r"no document to train on \(rejected: 1 invalid JSON\)"),
        ([tmp_path / "none.jsonl"], "no such file or folder"),
        ([tmp_path / "folder"], "no .jsonl"),
    ):
        with pytest.raises(DataError, match=message):
            run(inputs, tmp_path / "out", tokenizer)
    for wrong in ({"heldout_frac": 1.0}, {"heldout_frac": -0.1}, {"shard_tokens": 0}):
        with pytest.raises(DataError, match="must be"):
            run([corpus], tmp_path / "out", tokenizer, **wrong)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_shards_are_replaced_only_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    run([corpus], tmp_path / "a", tokenizer)
    before = everything_in(tmp_path / "a")
    with pytest.raises(DataError, match="already there"):
        run([corpus], tmp_path / "a", tokenizer)
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(DataError, match="no document"):
        run([tmp_path / "bad.jsonl"], tmp_path / "a", tokenizer, overwrite=True)
    assert everything_in(tmp_path / "a") == before
    run([write_jsonl(corpus, TEXTS)], tmp_path / "a", tokenizer, overwrite=True)
    assert open_shards(tmp_path / "a" / "train").num_documents > 100
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="other files"):
        run([corpus], tmp_path / "home", tokenizer, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    run([corpus], tmp_path / "a", tokenizer)
    before = everything_in(tmp_path)

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shard_writer, "_sync", full)
    with pytest.raises(DataError, match="the disk is full; nothing was published"):
        run([corpus], tmp_path / "a", tokenizer, overwrite=True)
    assert everything_in(tmp_path) == before


def test_the_verb_prints_what_it_wrote(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command = ["preprocess", str(corpus), "--tokenizer", str(tokenizer.path)]
    command += ["--output", str(tmp_path / "a"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["documents"]["train"] > 150
    assert main(command) == 2
    assert "already there" in capsys.readouterr().err
    assert main([*command[:-1], "--overwrite"]) == 0
    assert "documents" in capsys.readouterr().out
