"""Looking at shards, proving them whole, and cutting them anew."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from megatron_curr.cli import main
from megatron_curr.data.manifest import read_manifest
from megatron_curr.data.shards import open_shards
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, run, small_tokenizer, write_jsonl


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Seven shards or so with a document table."""
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS, source="web")
    with corpus.open("a") as stream:
        stream.write("{\n")
    run([corpus], tmp_path / "a", heldout_frac=0, shard_tokens=1_000, metadata=("source", "id:int"))
    return tmp_path / "a" / "train"


def test_inspect_tells_what_is_there(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(shards), "--json", "--verify"]) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = [len(small_tokenizer().encode(text)) + 1 for text in TEXTS]
    assert (found["documents"], found["tokens"]) == (len(TEXTS), sum(tokens))
    assert sum(found["histogram"].values()) == len(TEXTS)
    assert found["histogram"]["32"] == sum(16 < count <= 32 for count in tokens)
    assert found["metadata"]["source"] == [["web", len(TEXTS)]]
    assert found["rejected_rows"] == {"invalid JSON": 1} and found["faults"] == []
    assert len(found["samples"]) == 3
    assert all(any(text.startswith(s["text"][:20]) for text in TEXTS) for s in found["samples"])
    assert main(["inspect", str(shards)]) == 0
    told = capsys.readouterr().out
    assert "200 documents" in told and "up to" in told and "source: 'web' 200" in told


def test_inspect_refuses_another_tokenizer(shards: Path) -> None:
    other = str(small_tokenizer("bpe").path)
    assert main(["inspect", str(shards), "--tokenizer", other]) == 2


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".documents.parquet"])
def test_verify_finds_one_flipped_byte(
    shards: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(shards)]) == 0
    victim = shards / f"a_train_00001{suffix}"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(shards)]) == 1
    assert f"{victim}: sha256" in capsys.readouterr().out
    victim.unlink()
    assert main(["verify", str(shards)]) in (1, 2)


def test_split_and_merge_give_the_same_bytes_back(tmp_path: Path, shards: Path) -> None:
    small, whole = tmp_path / "small", tmp_path / "whole"
    assert main(["split-shards", str(shards), "--shard-tokens", "300", "--output", str(small)]) == 0
    both = ["merge-shards", str(small), "--output", str(whole), "--shard-tokens", "1k"]
    assert main([*both, "--workers", "2"]) == 0
    assert len(open_shards(small).shards) > len(open_shards(shards).shards)
    for suffix in (".bin", ".idx", ".parquet"):
        made, known = (sorted(folder.glob(f"*{suffix}")) for folder in (whole, shards))
        for ours, theirs in zip(made, known, strict=True):
            if suffix == ".parquet":
                rows = [pq.read_table(path).drop_columns("shard") for path in (ours, theirs)]
                assert rows[0].equals(rows[1])
            else:
                assert ours.read_bytes() == theirs.read_bytes()
    manifest = read_manifest(whole)
    assert manifest is not None and manifest.tokenizer is not None
    assert manifest.options["cut_from"] == [str(small)]
    assert manifest.options["metadata"] == ["source", "id:int"]
    assert main(["verify", str(whole)]) == 0
    assert main(both) == 2  # already there


def test_shards_given_twice_are_not_merged(tmp_path: Path, shards: Path) -> None:
    from data_tools.merge_shards import recut_shards

    (tmp_path / "link").symlink_to(shards)
    with pytest.raises(DataError, match="given twice, so its documents would be there twice"):
        recut_shards([shards, tmp_path / "link"], tmp_path / "x", shard_tokens=1_000)
    assert not (tmp_path / "x").exists()


def test_shards_of_different_tokenizers_are_not_merged(tmp_path: Path, shards: Path) -> None:
    from data_tools.merge_shards import recut_shards

    run([tmp_path / "a.jsonl"], tmp_path / "b", kind="bpe")
    with pytest.raises(DataError, match="different tokenizers"):
        recut_shards([shards, tmp_path / "b" / "train"], tmp_path / "x", shard_tokens=1_000)
    assert not (tmp_path / "x").exists()
