"""Trace: what a sample is made of, when a document is read, and that the two agree."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_curr.cli import main
from megatron_curr.curriculum.ledger import amend, append_entries, open_ledger
from megatron_curr.recipe.phases import Curriculum
from megatron_curr.trace import open_trace, trace_command
from tests.data.corpora import recipe, recipe_dict, write_source


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    write_source(tmp_path / "prose", 6000)
    write_source(tmp_path / "code", 6000, first_id=500)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe_dict(tmp_path)))
    return path


def rows(target: Path, **options: object) -> list[dict]:
    return [json.loads(line) for line in trace_command(target, as_json=True, **options)]


def test_every_sample_is_covered_by_its_spans(recipe_file: Path) -> None:
    trace = open_trace(recipe_file)
    total = trace.schedule.total_samples
    traced = rows(recipe_file, count=10**6)
    assert [row["position"] for row in traced] == list(range(total))
    clock = 0
    for row in traced:
        assert row["consumed_tokens"] == clock
        assert sum(span["num_tokens"] for span in row["spans"]) == row["seq_length"]
        assert row["phase"] == trace.schedule.stretch_at(clock).phase
        shard_set, tokens = trace.shard_sets[row["source"]], []
        for span in row["spans"]:
            begin, length = shard_set.document_range(span["shard"], span["document"])
            assert span["first_token"] + span["num_tokens"] <= length
            tokens += shard_set.read(begin + span["first_token"], span["num_tokens"]).tolist()
        assert tokens == shard_set.read(row["first_token"], row["seq_length"]).tolist()
        clock += row["seq_length"]
    assert clock == trace.schedule.total_tokens


def test_the_inverse_finds_exactly_the_samples_that_show_a_document(recipe_file: Path) -> None:
    shown: dict[str, list[int]] = {}
    for row in rows(recipe_file, count=10**6):
        for span in row["spans"]:
            shown.setdefault(f"{span['shard']}:{span['document']}", []).append(row["position"])
    trace = open_trace(recipe_file)
    draw = np.random.default_rng(0)
    for source in trace.shard_sets.values():
        for shard in source.shards:
            for document in draw.integers(0, shard.num_documents, 12).tolist():
                name = f"{shard.name}:{document}"
                found = [row["position"] for row in rows(recipe_file, document=name)]
                assert found == shown.get(name, []), name


def test_a_token_starts_at_the_sample_that_consumes_it(recipe_file: Path) -> None:
    assert rows(recipe_file, token=2047)[0]["consumed_tokens"] == 2032
    assert rows(recipe_file, token=2048)[0]["consumed_tokens"] == 2048
    assert [row["phase"] for row in rows(recipe_file, token=2040, count=2)] == ["short", "mixed"]


def test_a_run_is_traced_by_its_ledger(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_bytes(recipe_file.read_bytes())
    assert rows(run, count=300) == rows(recipe_file, count=300)
    ledger = open_ledger(recipe(tmp_path).curriculum)
    amended = recipe_dict(tmp_path)["curriculum"]
    amended["phases"][1]["mixture"] = {"to": {"prose": 0.0, "code": 1.0}}
    curriculum = Curriculum.model_validate(amended)
    ledger = amend(ledger, curriculum, from_tokens=2048, reason="more code")
    append_entries(run / "ledger.jsonl", ledger)
    before, after = rows(recipe_file, count=300), rows(run, count=300)
    assert before[:128] == after[:128]
    assert before[128:] != after[128:]


def test_two_sources_with_one_shard_name_are_told_apart(tmp_path: Path) -> None:
    for source in ("prose", "code"):
        write_source(tmp_path / source / "text", 6000, num_shards=1)
    raw = recipe_dict(tmp_path)
    for source in ("prose", "code"):
        raw["data"]["sources"][source]["shards"] = str(tmp_path / source / "text")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(raw))
    row = rows(path)[0]
    assert row["spans"][0]["shard"] == "prose/text_00000"
    document = f"prose/text_00000:{row['spans'][0]['document']}"
    assert 0 in [found["position"] for found in rows(path, document=document)]
    assert rows(path, document=document.replace("prose", "code")) != rows(path, document=document)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--position", "100000"], "the run has positions 0 to"),
        (["--token", "1M"], "the run has tokens 0 to"),
        (["--document", "prose_0000:1"], "such as prose_0000"),
        (["--document", "prose_00000"], "write SHARD:I"),
        (["--document", "prose_00000:99999"], "it holds documents 0 to"),
        (["--text"], "no such tokenizer"),
    ],
)
def test_wrong_questions_are_answered_with_the_range(
    recipe_file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["trace", str(recipe_file), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["trace", str(tmp_path)]) == 2
    assert "no recipe.yaml in it" in capsys.readouterr().err


def test_lines_for_people(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(recipe_file), "--count", "3", "--set", "seed=9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[1].startswith("position 1  token 16  short  prose  epoch 0  ")


def test_tracing_loads_no_torch(recipe_file: Path) -> None:
    program = (
        "import sys\nfrom megatron_curr.cli import main\n"
        f"main(['trace', {str(recipe_file)!r}])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
