"""What ``submit`` refuses before it asks Slurm, and what it freezes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm.checks import Pace, check_slice
from launch.slurm.freeze import freeze_code
from launch.slurm.profile import load_profile
from launch.slurm.submission import events, submissions
from launch.slurm.submit import Wish, job_name, submit_run
from megatron_curr.errors import UserError
from tests.training.tiny import recipe_values, write_corpus, write_recipe

PROFILE = {
    "name": "x",
    "partition": "batch",
    "nodes": 1,
    "ranks_per_node": 2,
    "gpus": "none",
    "time_limit": "1:00:00",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without Slurm's commands."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


def refusal(corpus: Path, tmp_path: Path, run_folder: Path | None = None, **changes: Any) -> str:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, **changes}, sort_keys=False))
    values = recipe_values(corpus, run_folder or tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe.yaml", values)
    with pytest.raises(UserError) as caught:
        submit_run(recipe, profile, [], Wish(), dry_run=False)
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_without_slurm_nothing_is_written(corpus: Path, tmp_path: Path) -> None:
    assert "sinfo is not on the PATH; run this on a login node" in refusal(corpus, tmp_path)


def test_dry_run_needs_no_slurm_and_writes_nothing(corpus: Path, tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(PROFILE))
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(corpus, tmp_path / "run"))
    done = submit_run(recipe, profile, [], Wish(chain=None), dry_run=True)
    assert done.job_id is None and "--partition=batch" in done.as_text()
    assert "not checked against the cluster: sinfo is not on the PATH" in done.unchecked
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ranks_per_node": 3}, "must be a multiple of 384 (128 tokens a micro-batch x 3"),
        ({"time_limit": "0:05"}, "profile.yaml:6: time_limit: 5 m is too short for the checks"),
        (
            {"shared_folders": ["/lustre"]},
            "must lie on a disk that all nodes share; set run_folder",
        ),
        ({"gpu": "h100-80g"}, "gpu: the plan has no GPU 'h100-80g'; did you mean 'h100-80gb'?"),
    ],
)
def test_what_would_fail_in_the_job_is_refused_before_it(
    changes: dict[str, Any], expected: str, corpus: Path, tmp_path: Path
) -> None:
    assert expected in refusal(corpus, tmp_path, **changes)


def test_a_run_folder_in_memory_is_refused(corpus: Path, tmp_path: Path) -> None:
    message = refusal(corpus, tmp_path, Path("/dev/shm/no-such-run"))
    assert "would lie in tmpfs, which only this machine sees" in message


def test_a_slice_is_measured_by_starts_steps_and_saves(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump({**PROFILE, "time_limit": "0:30", "signal_slack_s": 60}))
    loaded = load_profile(profile)
    check_slice(loaded, Pace(start_s=600, step_s=20, save_s=200))
    with pytest.raises(UserError, match=r'set it to "0-00:34:00" or more'):
        check_slice(loaded, Pace(start_s=1600, step_s=20, save_s=200))
    with pytest.raises(UserError, match=r"a save 5 m; set it to 481 or more"):
        check_slice(loaded, Pace(start_s=60, step_s=20, save_s=300))


def test_code_is_frozen_once_for_each_state(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    first, second = freeze_code(tmp_path), freeze_code(tmp_path)
    assert first == second
    assert (first.folder / "launch" / "slurm" / "job.py").is_file()
    assert (first.folder / "megatron_curr" / "recipe" / "model_presets.yaml").is_file()
    assert len(list((tmp_path / "slurm" / "code").iterdir())) == 1


def test_events_survive_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    file = tmp_path / "slurm" / "events.jsonl"
    file.write_text(json.dumps({"what": "job", "submission": 1}) + '\n{"what": "st')
    assert [event["what"] for event in events(tmp_path)] == ["job"]
    assert submissions(tmp_path) == []


def test_job_names_tell_runs_of_one_name_apart(tmp_path: Path) -> None:
    assert job_name(tmp_path / "a" / "demo") != job_name(tmp_path / "b" / "demo")
    assert job_name(tmp_path / "a" / "demo").startswith("demo-")
