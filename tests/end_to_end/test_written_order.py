"""Nothing depends on how things were written down: keys of mappings, files of folders, a ledger."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_curr.cli import main
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.data.shards import ShardWriter
from megatron_curr.recipe.load import dump_recipe, load_recipe
from tests.ranks import run_ranks
from tests.recipe.recipes import with_keys_shuffled
from tests.training.runs import newest_tensors, rows, train_rank, verified_steps
from tests.training.tiny import recipe_values, write_corpus

NAMES = ("prose", "code", "math", "web")
TIED = dict.fromkeys(NAMES, 0.25)


def write_sources(root: Path) -> dict[str, dict[str, str]]:
    """Three shards a source: of two by their folder, of two by a glob."""
    draws = np.random.default_rng(5)
    for name in NAMES:
        for number in range(3):
            with ShardWriter(
                root / name / "train" / f"{number:05d}", np.dtype(np.uint16)
            ) as writer:
                for _ in range(40):
                    length = int(draws.integers(20, 120))
                    writer.add_document(np.append(10 + draws.integers(0, 250, length), 2))
    train = [root / name / "train" for name in NAMES]
    specs = [str(folder) if folder < train[0] else f"{folder}/*.idx" for folder in train]
    return {name: {"shards": spec} for name, spec in zip(NAMES, specs, strict=True)}


def made_anew(root: Path) -> None:
    """The same shards in the same place, their files created the other way round."""
    aside = root.rename(root.with_name("aside"))
    for file in sorted(aside.rglob("*"), reverse=True):
        if file.is_file():
            copied = root / file.relative_to(aside)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copied)
    shutil.rmtree(aside)


def rewritten(ledger: Path, random: Random) -> None:
    """The same entries, the keys of every line in another order."""
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    ledger.write_text("".join(json.dumps(with_keys_shuffled(x, random)) + "\n" for x in lines))


def written(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    main(list(map(str, arguments)))
    return capsys.readouterr().out


def outcomes(
    recipe: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[str, object]]:
    """All that is said and written of a run, and of a recipe before it runs."""
    yield "order", told(capsys, "trace", recipe, "--count", 10_000, "--json")
    yield "trace", told(capsys, "trace", run, "--count", 10_000)
    yield "document", told(capsys, "trace", run, "--document", "web/00001:3")
    yield "plan", told(capsys, "plan", recipe, "--gpus-per-node", 1)
    told(capsys, "report", run)
    yield "report", (run / "report.html").read_bytes()
    shutil.rmtree(run / "hf", ignore_errors=True)
    run_conversion(run, run / "hf", verify=False)
    for file in sorted((run / "hf").rglob("*")):
        if file.is_file():
            yield str(file.relative_to(run)), file.read_bytes()


def test_no_outcome_depends_on_the_order_in_which_things_were_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = Random(3)
    write_corpus(tmp_path / "corpus")
    values = recipe_values(tmp_path / "corpus", tmp_path / "run")
    values["data"]["sources"] = write_sources(tmp_path / "shards")
    short, mixed = values["curriculum"]["phases"]
    short["mixture"] = TIED
    mixed["mixture"] = {"to": {"web": 0.4, "prose": 0.2, "math": 0.2, "code": 0.2}}
    written(tmp_path / "recipe.yaml", values)
    run_ranks(train_rank, 1, str(tmp_path / "recipe.yaml"), 1, None)

    other = {**values, "run_folder": str(tmp_path / "other")}
    for stop_at_tokens in (2500, None):  # each start with keys in an order of its own
        recipe = written(tmp_path / "other.yaml", with_keys_shuffled(other, random))
        run_ranks(train_rank, 1, str(recipe), 1, stop_at_tokens)
        rewritten(tmp_path / "other" / "ledger.jsonl", random)
        made_anew(tmp_path / "shards")
    assert rows(tmp_path / "other") == rows(tmp_path / "run")
    assert newest_tensors(tmp_path / "other") == newest_tensors(tmp_path / "run")
    assert verified_steps(tmp_path / "other") == 24

    run = tmp_path / "run"
    before = dict(outcomes(tmp_path / "recipe.yaml", run, capsys))
    shuffled = written(tmp_path / "recipe.yaml", with_keys_shuffled(values, random))
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(shuffled)))  # as a start writes it
    rewritten(run / "ledger.jsonl", random)
    made_anew(tmp_path / "shards")
    after = dict(outcomes(tmp_path / "recipe.yaml", run, capsys))
    assert sorted(after) == sorted(before)
    assert [name for name in before if after[name] != before[name]] == []
    assert "web" in str(before["trace"]) and len(before) > 8
