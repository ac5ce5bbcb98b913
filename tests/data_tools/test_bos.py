"""A BOS before documents: as the tokenizer itself sets one, told, checked, the same everywhere."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from data_tools.merge_shards import recut_shards
from data_tools.preprocess_text import Options, RunSettings, Summary, preprocess
from megatron_curr.cli import main
from megatron_curr.data.manifest import read_manifest
from megatron_curr.data.shards import open_shards
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, small_tokenizer, write_jsonl


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """It begins a text with `<|low|>`, by its post-processor."""
    shutil.copytree(small_tokenizer("bpe").path.parent, tmp_path / "tok")
    path = tmp_path / "tok" / "tokenizer.json"
    made = tokenizers.Tokenizer.from_file(str(path))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|low|> $A", special_tokens=[("<|low|>", made.token_to_id("<|low|>"))]
    )
    made.save(str(path))
    return load_tokenizer(path)


def shards_of(tokenizer: Tokenizer, output: Path, **options: object) -> Summary:
    return preprocess(
        [write_jsonl(output.with_suffix(".jsonl"), TEXTS, score=0.5, url="e.org")],
        output,
        tokenizer=tokenizer.path,
        options=Options(heldout_frac=0, **options),
        settings=RunSettings(),
        show_progress=False,
    )


def documents_of(folder: Path) -> list[list[int]]:
    shards = open_shards(folder)
    tokens = shards.read(0, shards.num_tokens)
    starts = shards.shards[0].document_starts(0, shards.num_documents)
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]


def test_documents_begin_as_the_tokenizer_begins_a_text(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    bos_id = tokenizer.special_tokens["<|low|>"]
    summaries = {
        mode: shards_of(tokenizer, tmp_path / mode, bos=mode) for mode in ("auto", "yes", "no")
    }
    own = tokenizers.Tokenizer.from_file(str(tokenizer.path))
    expected = [[*own.encode(text).ids, tokenizer.eod_id] for text in TEXTS]
    assert expected[0][0] == bos_id
    for mode, summary in summaries.items():
        found = documents_of(tmp_path / mode / "train")
        assert found == (expected if mode != "no" else [row[1:] for row in expected])
        manifest = read_manifest(tmp_path / mode / "train")
        assert manifest.tokenizer.bos_ids == (() if mode == "no" else (bos_id,))
        assert manifest.options["bos"] == mode
        assert f"<|low|> ({bos_id})" in summary.bos
    assert "--bos no leaves it out" in summaries["auto"].bos
    assert open_shards(tmp_path / "auto" / "train").shards[0].masked_tokens is None


def test_a_bos_before_what_carries_no_loss_carries_none_either(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    shards_of(tokenizer, tmp_path / "a", metadata_prefix=("url",))
    bos_id, meta_id = (tokenizer.special_tokens[name] for name in ("<|low|>", "<meta>"))
    shard = open_shards(tmp_path / "a" / "train").shards[0]
    masked = shard.masked_tokens
    rows = documents_of(tmp_path / "a" / "train")
    for row, text, count in zip(rows, TEXTS, masked, strict=True):
        assert row[:2] == [bos_id, meta_id]
        assert row[count:] == [*tokenizer.encode(text), tokenizer.eod_id]
    assert main(["verify", str(tmp_path / "a" / "train")]) == 0


def test_inspect_tells_it_and_verify_checks_it(
    tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    shards_of(tokenizer, tmp_path / "a")
    folder = tmp_path / "a" / "train"
    bos_id = tokenizer.special_tokens["<|low|>"]
    assert main(["inspect", str(folder), "--verify"]) == 0
    assert f"documents begin with: {bos_id} (BOS)" in capsys.readouterr().out
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["tokenizer"]["bos_ids"] = [bos_id + 1]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert main(["verify", str(folder)]) == 1
    assert f"200 documents lack the BOS {bos_id + 1}" in capsys.readouterr().out


def test_shards_with_and_without_do_not_mix(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for mode in ("auto", "no"):
        shards_of(tokenizer, tmp_path / mode, bos=mode)
    folders = [tmp_path / mode / "train" for mode in ("auto", "no")]
    with pytest.raises(DataError, match="different tokenizers or --bos"):
        recut_shards(folders, tmp_path / "both", shard_tokens=1_000)
    recut_shards(folders[:1], tmp_path / "cut", shard_tokens=1_000)
    assert read_manifest(tmp_path / "cut").tokenizer == read_manifest(folders[0]).tokenizer


def test_a_manifest_from_before_has_no_bos(tmp_path: Path) -> None:
    shards_of(small_tokenizer(), tmp_path / "a")
    path = tmp_path / "a" / "train" / "manifest.json"
    content = json.loads(path.read_bytes())
    del content["tokenizer"]["bos_ids"]
    path.write_text(json.dumps(content))
    assert open_shards(path.parent).tokenizers[0].bos_ids == ()
    assert np.array_equal(documents_of(path.parent)[0][:-1], small_tokenizer().encode(TEXTS[0]))
