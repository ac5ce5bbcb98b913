"""What `check`, `train --dry-run` and `plan` find without starting a rank or writing a byte."""

from __future__ import annotations

import json
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.check import check_recipe_file
from megatron_curr.cli import main
from megatron_curr.training import room
from tests.convert.toy_models import save_toy
from tests.training.tiny import VOCAB_SIZE, recipe_values, write_corpus, write_recipe
from tests.training.tiny_video import video_recipe_values, write_video_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(**changes: Any) -> Path:
        values = recipe_values(corpus, tmp_path / "run")
        for path, value in changes.items():
            *parents, last = path.split("__")
            section: Any = values
            for key in parents:
                section = section[key]
            section[last] = value
        return write_recipe(tmp_path / "recipe.yaml", values)

    return write


def test_a_sound_recipe_is_told_as_it_would_start(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(recipe()), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["ranks"], found["start_tokens"]) == ("tiny", 1, 0)
    assert (found["total_tokens"], found["num_samples"]) == (8192, 128 + 64)
    assert found["vocab_size"] == VOCAB_SIZE
    assert set(found["source_tokens"]) == set(found["heldout_sources"]) == {"prose", "code"}
    assert 0 < found["room"]["needed_bytes"] < found["room"]["free_bytes"]
    assert not (tmp_path / "run").exists()


def test_ranks_are_as_few_as_the_layout_takes(recipe: Callable[..., Path]) -> None:
    path = recipe(parallel__tensor_model_parallel_size=2, parallel__pipeline_model_parallel_size=2)
    assert check_recipe_file(path).ranks == 4


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"init_from": "hf:/nope"}, "init_from: /nope: no such folder"),
        ({"init_from": "ema:/nope"}, "init_from: /nope: no such folder"),
        ({"data__tokenizer": "/nope.model"}, "/nope.model: no such tokenizer"),
        ({"data__sources__code__heldout": "/nope"}, "/nope: neither a folder nor a shard"),
        ({"data__sources__code__shards": "/nope/*"}, "/nope/*"),
        ({"model__vocab_size": 100}, "model.vocab_size=100 is smaller than the 320 pieces"),
        ({"run_folder": "/proc/x"}, "/proc/x: the run folder cannot be written"),
        ({"parallel__micro_batch_tokens": 96}, "must be a multiple of every seq_length"),
    ],
)
def test_what_training_would_refuse_is_found(
    recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    complaint: str,
) -> None:
    path = str(recipe(**changes))
    told = []
    for verb in (["check", path], ["train", path, "--dry-run"], ["train", path]):
        assert main(verb) == 2
        told.append(capsys.readouterr().err)
    assert complaint in told[0]
    assert told[0] == told[1] == told[2]
    assert not (tmp_path / "run").exists()


def test_published_model_of_another_shape_or_vocabulary_is_found(
    recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_toy("llama2", tmp_path / "hf")
    assert main(["check", str(recipe(init_from=f"hf:{tmp_path / 'hf'}"))]) == 2
    assert "was made with 2: set that" in capsys.readouterr().err
    assert main(["check", str(recipe(init_from=f"checkpoint:{tmp_path / 'hf'}"))]) == 2
    assert "is no checkpoint folder; write hf:" in capsys.readouterr().err


def test_a_video_recipe_is_checked_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_video_corpus(tmp_path / "corpus")
    values = video_recipe_values(tmp_path / "corpus", tmp_path / "run")
    path = write_recipe(tmp_path / "recipe.yaml", values)
    assert main(["check", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["heldout_sources"]) <= set(values["data"]["sources"])
    assert found["vocab_size"] == 0 and found["total_tokens"] > 0
    path = write_recipe(tmp_path / "recipe.yaml", {**values, "init_from": "ema:/nope"})
    assert main(["check", str(path)]) == 2
    assert "init_from: /nope" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_disk_too_small_for_two_checkpoints_is_found(
    recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda place: usage(2**20, 2**20 - 9, 9))
    assert main(["check", str(recipe())]) == 2
    assert "disk has 9 B free, two checkpoints need" in capsys.readouterr().err


def test_plan_says_what_training_would_refuse_where_the_data_is_here(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "1", "--gpus-per-node", "1", "--json"]
    assert main(["plan", str(recipe()), *options]) == 0
    assert json.loads(capsys.readouterr().out)["refusal"] is None
    assert main(["plan", str(recipe(init_from="hf:/nope")), *options]) == 1
    made = json.loads(capsys.readouterr().out)
    assert made["refusal"].startswith("init_from: /nope: no such folder")
    assert main(["plan", str(recipe(init_from="hf:/nope")), *options[:-1]]) == 1
    assert "TRAINING WOULD REFUSE IT: init_from: /nope" in capsys.readouterr().out


def test_plan_without_data_says_that_it_was_not_checked(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe(data__sources__code__shards="/nope", data__tokenizer="/nope.model")
    options = ["--gpus-per-node", "1", "--set", "model.vocab_size=320", "--json"]
    assert main(["plan", str(path), *options]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["refusal"] is None
    assert any("no check of the data, for code (/nope)" in remark for remark in made["remarks"])


def test_plan_says_that_chunks_leave_no_room_for_longer_sequences(
    recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    remark = "data.chunk_tokens is the longest seq_length, 64, for the whole run"
    main(["plan", str(recipe()), "--gpus-per-node", "1", "--json"])
    assert any(r.startswith(remark) for r in json.loads(capsys.readouterr().out)["remarks"])
    main(["plan", str(recipe(data__chunk_tokens=128)), "--gpus-per-node", "1", "--json"])
    assert not any("chunk" in r for r in json.loads(capsys.readouterr().out)["remarks"])
