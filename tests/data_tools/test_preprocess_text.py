"""Preprocessing: megatron-core's own bytes, a stable split, no row lost in silence."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.documents import is_held_out
from data_tools.preprocess_text import Options, RunSettings, preprocess
from data_tools.rejections import TooManyRejected
from data_tools.train_tokenizer import train_tokenizer
from megatron_curr.cli import main
from megatron_curr.data import shard_writer
from megatron_curr.data.manifest import read_manifest
from megatron_curr.data.shards import open_shards
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, everything_in, run, small_tokenizer, write_jsonl


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]


def test_every_document_is_there_once_with_its_eod_and_its_row(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "prose.jsonl", TEXTS)
    summary = run(
        [corpus], tmp_path / "prose", heldout_frac=0.2, shard_tokens=900, metadata=("id:int",)
    )
    tokenizer = small_tokenizer()
    found = []
    for split in ("train", "heldout"):
        shards = open_shards(tmp_path / "prose" / split)
        assert shards.num_tokens == summary.tokens[split]
        assert shards.num_documents == summary.documents[split]
        for shard in shards.shards:
            table = shard.prefix.with_name(shard.name + ".documents.parquet")
            rows = pq.read_table(table).to_pylist()
            assert [row["document"] for row in rows] == list(range(shard.num_documents))
            for row in rows:
                first, length = row["first_token"], row["num_tokens"]
                ids = shard.tokens[first : first + length].tolist()
                assert ids[-1] == tokenizer.eod_id and tokenizer.eod_id not in ids[:-1]
                text = tokenizer.decode(ids)
                assert text == TEXTS[row["id"]] and row["line"] == row["id"] + 1
                assert row["content_hash"] == digest(text)
                assert is_held_out(digest(text), 0.2) == (split == "heldout")
                assert (row["shard"], row["file"]) == (shard.name, str(corpus))
                found.append(row["id"])
    assert sorted(found) == list(range(len(TEXTS)))
    assert 10 < summary.documents["heldout"] < 80
    sizes = [shard.num_tokens for shard in open_shards(tmp_path / "prose" / "train").shards]
    assert len(sizes) > 3 and all(900 <= size < 1200 for size in sizes[:-1])


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_the_bytes_are_those_of_megatrons_builder(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    run([corpus], tmp_path / "a", kind=kind, engine="auto", heldout_frac=0)
    tokenizer = small_tokenizer(kind)
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


def test_the_split_stays_when_the_corpus_grows() -> None:
    held_out = [is_held_out(digest(text), 0.1) for text in TEXTS]
    assert 5 < sum(held_out) < 50
    assert [is_held_out(digest(text), 0.3) for text in TEXTS].count(True) > sum(held_out)
    assert all(is_held_out(digest(t), 0.3) for t in TEXTS if is_held_out(digest(t), 0.1))


def test_bad_rows_are_counted_and_listed_and_the_next_is_read(tmp_path: Path) -> None:
    lines = [
        b'{"text": "first"}',
        b"",
        b'{"text": ""}',
        b'{"body": "x"}',
        b'{"text": 3}',
        b'{"text": null}',
        b"[1]",
        b'{"text": "\xff\xfe"}',
        b'{"text": "cut',
        b'{"text": "' + b"long" * 20 + b'"}',
        b'{"text": "last </s> of all"}',
    ]
    corpus = tmp_path / "a.jsonl"
    corpus.write_bytes(b"\n".join(lines))
    how = {"heldout_frac": 0, "max_rejected_frac": 1.0, "max_document_bytes": 60}
    summary = run([corpus], tmp_path / "a", **how)
    assert summary.documents["train"] == 2
    listed = [json.loads(line) for line in (tmp_path / "a" / "rejects.jsonl").open()]
    assert [(row["line"], row["reason"]) for row in listed] == [
        (3, "empty text"),
        (4, "no field 'text'"),
        (5, "field 'text' is not text"),
        (6, "field 'text' is null"),
        (7, "not a JSON object"),
        (8, "invalid UTF-8"),
        (9, "invalid JSON"),
        (10, "longer than 60 bytes"),
    ]
    content = corpus.read_bytes()
    for row in listed:
        assert content[row["byte_offset"] :].startswith(lines[row["line"] - 1])
    assert listed[1]["fields"] == ["body"] and "first" not in listed[0]
    assert sum(summary.rejects.values()) == 8 and summary.passed_over == {"blank lines": 1}
    assert "rejected rows: " in summary.text() and "passed over: 1 blank lines" in summary.text()
    manifest = read_manifest(tmp_path / "a" / "train")
    assert manifest is not None and manifest.tokenizer is not None
    assert manifest.tokenizer.sha256 == small_tokenizer().sha256
    assert manifest.options["rejected_rows"] == summary.rejects
    shards = open_shards(tmp_path / "a" / "train")
    text = small_tokenizer().decode(shards.read(0, shards.num_tokens).tolist())
    assert text == "firstlast </s> of all"

    # In parts shorter than a line the same is found, and listed by its line in the whole file.
    cut = run([corpus], tmp_path / "cut" / "a", unit_bytes=12, **how)
    assert (cut.rejects, cut.passed_over) == (summary.rejects, summary.passed_over)
    assert (tmp_path / "cut/a/rejects.jsonl").read_bytes() == (
        tmp_path / "a/rejects.jsonl"
    ).read_bytes()
    with pytest.raises(TooManyRejected, match=r"8 of 10 rows rejected \(.*--max-rejected 0.5"):
        run([corpus], tmp_path / "b" / "a", **{**how, "max_rejected_frac": 0.5})
    assert not (tmp_path / "b" / "a").exists()
    kept = tmp_path / "b" / "a.partial" / "rejects.jsonl"
    assert kept.read_bytes() == (tmp_path / "a" / "rejects.jsonl").read_bytes()
    again = run([corpus], tmp_path / "b" / "a", **how)  # a raised limit goes on from there
    assert (again.units, again.units_kept, again.documents["train"]) == (1, 1, 2)


def test_a_run_that_goes_wrong_stops_before_its_end(tmp_path: Path) -> None:
    corpus = tmp_path / "a.jsonl"
    corpus.write_text("no json at all\n" * 3_000 + '{"text": "fine"}\n' * 7_000)
    size = corpus.stat().st_size
    with pytest.raises(TooManyRejected, match=r"so far rejected .* invalid JSON") as stopped:
        run([corpus], tmp_path / "a", unit_bytes=size // 50, max_rejected_frac=0.1)
    assert 2 < len(list((tmp_path / "a.partial" / "units").iterdir())) < 9
    assert not (tmp_path / "a").exists()
    listing = tmp_path / "a.partial" / "rejects.jsonl"
    assert str(listing) in str(stopped.value)
    listed = [json.loads(line) for line in listing.open()]
    assert 1_000 <= len(listed) < 3_000 and {row["reason"] for row in listed} == {"invalid JSON"}
    assert [row["line"] for row in listed[:3]] == [1, 2, 3] and listed[-1]["line"] is None
    assert [row["byte_offset"] for row in listed] == [15 * n for n in range(len(listed))]
    # Where the rest is good, the same beginning is no more than the run stands.
    run([corpus], tmp_path / "a", unit_bytes=size // 50, max_rejected_frac=0.3)
    assert open_shards(tmp_path / "a" / "train").num_documents > 6_000


def test_a_field_that_is_not_there_is_told_with_those_that_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for count in (5, 1_200):
        corpus = tmp_path / f"{count}.jsonl"
        corpus.write_text("".join(f'{{"content": "{n}", "id": {n}}}\n' for n in range(count)))
        for workers in ("1", "2"):
            command = ["preprocess", str(corpus), "--tokenizer", str(small_tokenizer().path)]
            command += ["--workers", workers, "--output", str(tmp_path / "a")]
            assert main(command) == 1
            told = capsys.readouterr().err
            listing = tmp_path / "a.partial" / "rejects.jsonl"
            assert f"{count:,} no field 'text'" in told and "has the fields content, id" in told
            assert str(listing) in told and len(listing.read_bytes().splitlines()) == count


def test_what_holds_no_document_is_said_alone_and_among_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "void").mkdir(parents=True)
    write_jsonl(folder / "a.jsonl", TEXTS[:30])
    for name in ("b.jsonl", "c.txt", "d.json"):
        (folder / name).touch()
    (folder / "e.jsonl.gz").write_bytes(gzip.compress(b""))
    (folder / "f.jsonl").write_text("\n\n")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "g.parquet")
    (folder / "h.json").write_text("[]")
    for unit_bytes in (300, 1 << 20):
        output = tmp_path / str(unit_bytes) / "x"
        summary = run([folder], output, unit_bytes=unit_bytes)
        assert sum(summary.documents.values()) == 30 and not summary.rejects
        assert summary.passed_over == {"empty files": 6, "blank lines": 2, "empty folders": 1}
        assert json.loads(summary.json())["passed_over"] == summary.passed_over
        assert "6 empty files" in summary.text()
        listed = [json.loads(line) for line in (output / "rejects.jsonl").open()]
        assert [Path(row["file"]).name[0] for row in listed] == list("bcdegh")
        assert {row["reason"] for row in listed} == {"empty files"}
        manifest = read_manifest(output / "train")
        assert manifest is not None and manifest.options["passed_over"] == summary.passed_over
    (folder / "a.jsonl").unlink()
    for inputs in ([folder], [folder / "e.jsonl.gz"], [folder / "g.parquet"], [folder / "h.json"]):
        with pytest.raises(DataError, match=r"no document to train on \(.*passed over: [1-9]"):
            run(inputs, tmp_path / "y")
    assert not (tmp_path / "y").exists() and not (tmp_path / "y.partial").exists()


def test_a_corpus_too_small_to_hold_anything_out_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [text for text in TEXTS if not is_held_out(digest(text), 0.02)][:3]
    corpus = write_jsonl(tmp_path / "a.jsonl", few)
    command = ["preprocess", str(corpus), "--tokenizer", str(small_tokenizer().path)]
    command += ["--workers", "1", "--output", str(tmp_path / "a")]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "a/heldout: nothing held out, so there is no such folder" in told
    assert "--heldout-frac 0.02 of 3 documents is about 0.1" in told
    assert main([*command, "--heldout-frac", "0", "--overwrite"]) == 0
    assert "held" not in capsys.readouterr().out
    held_out = [text for text in TEXTS if is_held_out(digest(text), 0.5)][:3]
    with pytest.raises(DataError, match=r"--heldout-frac 0\.5 holds out all 3 of them; lower it"):
        run([write_jsonl(corpus, held_out)], tmp_path / "b", heldout_frac=0.5)


def test_wrong_input_writes_nothing(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS[:3])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.docx").write_text("x")
    for inputs, message in (
        ([tmp_path / "empty.jsonl"], "no document to train on; the input is empty, 0 bytes"),
        ([tmp_path / "none.jsonl"], "no such file or folder"),
        ([tmp_path / "folder"], "no .jsonl"),
        ([tmp_path / "*.parquet"], "no file matches"),
        ([tmp_path / "a.docx"], "unknown kind of file"),
        ([corpus, corpus], "named twice"),
        ([Path(f"@{tmp_path}/none.txt")], "cannot be read as a list"),
    ):
        with pytest.raises(DataError, match=message):
            run(inputs, tmp_path / "out")
    for wrong, message in (
        ({"heldout_frac": 1.0}, "must be"),
        ({"heldout_frac": -0.1}, "must be"),
        ({"shard_tokens": 0}, "must be"),
        ({"special_tokens": "maybe"}, "must be text, allow, error"),
        ({"normalize": ("nfd",)}, "known are nfc"),
        ({"metadata": ("a:date",)}, "NAME:TYPE"),
        ({"metadata": ("a", "a:int")}, "named twice"),
        ({"filter": "open('x')"}, "no known function"),
        ({"filter": "a."}, "write it as Python"),
        ({"filter": "a.b"}, "Attribute is not allowed"),
        ({"template": "{a.b}"}, "by plain name"),
        ({"control_tokens": "quality: <a> 3 <b> 2 <c>"}, "rising bounds"),
        ({"control_tokens": "quality: <a> 3 <b>"}, "has no special token '<a>'"),
        ({"engine": "magic"}, "known are auto"),
        ({"task": 2, "num_tasks": 2}, "tasks go from 0 to 1"),
    ):
        with pytest.raises(DataError, match=message):
            run([corpus], tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_shards_are_replaced_only_when_asked(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    assert run([corpus], tmp_path / "a").state == "done"
    before = everything_in(tmp_path / "a")
    assert run([corpus], tmp_path / "a").state == "already done"
    with pytest.raises(DataError, match="already there, from other input or options"):
        run([corpus], tmp_path / "a", heldout_frac=0.3)
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(TooManyRejected, match="1 of 1 rows rejected"):
        run([tmp_path / "bad.jsonl"], tmp_path / "a", overwrite=True)
    assert everything_in(tmp_path / "a") == before
    run([write_jsonl(corpus, TEXTS)], tmp_path / "a", overwrite=True)
    assert open_shards(tmp_path / "a" / "train").num_documents > 100
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="other files"):
        run([corpus], tmp_path / "home", overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").exists()


def test_another_tokenizer_under_the_same_path_is_not_taken_for_the_first(tmp_path: Path) -> None:
    corpus, model = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20]), tmp_path / "t.model"
    settings = RunSettings(engine="reference")
    for vocab_size in (300, 290):
        made = train_tokenizer([corpus], model, vocab_size=vocab_size)
        preprocess(
            [corpus], tmp_path / f"{vocab_size}", tokenizer=model,
            options=Options(heldout_frac=0), settings=settings, show_progress=False,
        )  # fmt: skip
        shards = open_shards(tmp_path / f"{vocab_size}" / "train")
        assert made.decode(shards.read(0, shards.num_tokens).tolist()) == "".join(TEXTS[:20])


def test_a_full_disk_leaves_what_was_there_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS[:20])
    run([corpus], tmp_path / "a")
    before = everything_in(tmp_path / "a")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shard_writer, "sync", full)
        with pytest.raises(DataError, match="the disk is full; nothing was published"):
            run([corpus], tmp_path / "a", overwrite=True)
    assert everything_in(tmp_path / "a") == before
    assert not list((tmp_path / "a.partial" / "units").iterdir())
    run([corpus], tmp_path / "a", overwrite=True)
    assert everything_in(tmp_path / "a") == before
    assert not (tmp_path / "a.partial").exists()


def test_the_verb_prints_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    command = ["preprocess", str(corpus), "--tokenizer", str(small_tokenizer().path)]
    command += ["--workers", "1", "--output", str(tmp_path / "a"), "--json"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["documents"]["train"] > 150
    assert main(command[:-1]) == 0
    assert "already done" in capsys.readouterr().out
    assert main([*command, "--heldout-frac", "0.3"]) == 2
    assert "already there" in capsys.readouterr().err
    assert main([*command[:-1], "--overwrite"]) == 0
    told = capsys.readouterr()
    assert "documents" in told.out and "equal to sentencepiece on" in told.err
