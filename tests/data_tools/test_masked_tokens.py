"""What is set before a document is read but not learned, in whatever window it falls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.inspect_shards import inspect_shards
from megatron_curr.cli import main
from megatron_curr.data.idx_format import masked_path
from megatron_curr.data.manifest import FILE_NAME
from megatron_curr.data.shards import open_shards
from megatron_curr.data.windows import Row, cut_rows
from tests.data_tools.text_corpora import TEXTS, marked_as_masked, run


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with metadata before most documents and a control token before all; repetitions."""
    folder = tmp_path_factory.mktemp("masked")
    rows: list[dict[str, object]] = []
    for number, text in enumerate(TEXTS):
        address = {"url": f"http://e.org/{number}"} if number % 3 else {}
        rows += [{"text": text, "quality": number % 5 / 4, **address}] * 2
    corpus = folder / "a.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = {"metadata_prefix": ("url",), "control_tokens": "quality: <|low|> 0.5 <|high|>"}
    sizes = {"heldout_frac": 0.2, "shard_tokens": 2_000, "unit_bytes": 4_000}
    run([corpus], folder / "a", deduplicate=True, **how, **sizes)
    run([corpus], folder / "plain", heldout_frac=0, shard_tokens=2_000)
    return folder


def check_masks(folder: Path) -> None:
    """Every window of some lengths, against the document tables token by token."""
    shards, marks = open_shards(folder), marked_as_masked(folder)
    assert len(marks) == shards.num_tokens and 0.05 < marks.mean() < 0.9
    starts = np.zeros(shards.num_tokens, np.bool_)
    starts[shards.document_starts(0, shards.num_tokens)] = True
    for length in (7, 64, 1_000):
        firsts = range(0, shards.num_tokens - length, length // 2 + 2)
        rows = [Row(shards, first, length) for first in firsts]
        for isolated, left_out in ((False, marks), (True, marks | starts)):
            labels = np.lib.stride_tricks.sliding_window_view(left_out[1:], length)
            found = cut_rows(rows, length, isolate_documents=isolated).loss_mask_BS
            assert np.array_equal(found, ~labels[firsts])


def test_the_loss_mask_is_what_the_document_tables_say(output: Path, tmp_path: Path) -> None:
    train = output / "a" / "train"
    assert len(list(train.glob("*.masked"))) > 3
    assert not list((output / "plain").rglob("*.masked"))
    check_masks(train)
    check_masks(output / "a" / "heldout")
    cut = ["--output", str(tmp_path / "cut"), "--shard-tokens", "700"]
    assert main(["split-shards", str(train), *cut]) == 0
    check_masks(tmp_path / "cut")
    # Joined with shards that have no masked tokens, and opened by their files alone.
    both = [str(output / "plain" / "train"), str(tmp_path / "cut")]
    assert main(["merge-shards", *both, "--output", str(tmp_path / "both")]) == 0
    check_masks(tmp_path / "both")
    assert main(["verify", str(tmp_path / "both")]) == 0
    told = inspect_shards(tmp_path / "both", num_samples=0)
    assert told.masked_tokens == marked_as_masked(tmp_path / "both").sum()
    (tmp_path / "both" / FILE_NAME).unlink()
    check_masks(tmp_path / "both")


def test_verify_checks_what_is_masked(
    output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "s"
    command = ["split-shards", str(output / "a" / "heldout"), "--output", str(folder)]
    assert main([*command, "--shard-tokens", "1M"]) == 0
    path = masked_path(folder / "s_00000")
    counts = np.fromfile(path, np.int32)
    (counts + np.eye(1, len(counts), dtype=np.int32)[0]).tofile(path)
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 1
    assert f"{path}: sha256" in capsys.readouterr().out
    # Without a manifest the files are still held against each other.
    (folder / FILE_NAME).unlink()
    assert main(["verify", str(folder)]) == 1
    told = f"{counts.sum():,} tokens that they carry no loss, but {path.name} masks"
    assert told in capsys.readouterr().out
    np.full_like(counts, 10_000).tofile(path)
    assert main(["verify", str(folder)]) == 1
    assert "masks more tokens than a document has" in capsys.readouterr().out
