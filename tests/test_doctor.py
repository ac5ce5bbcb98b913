import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_curr import doctor as under_test
from megatron_curr.doctor import diagnose, doctor
from tests.recipe.recipes import sound_recipe


def pretend_apex(monkeypatch: pytest.MonkeyPatch, folder: Path, version: str | None) -> None:
    """An ``apex`` that lives in this folder, installed under this version."""
    find_spec, find_version = under_test.find_spec, under_test._version
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(
        under_test, "find_spec", lambda name: spec if name == "apex" else find_spec(name)
    )
    monkeypatch.setattr(
        under_test, "_version", lambda name: version if name == "apex" else find_version(name)
    )


def test_diagnosis_names_what_the_stack_stands_on() -> None:
    diagnosis = diagnose()
    assert diagnosis.found["torch"] != "not installed"
    assert diagnosis.found["megatron-core"].startswith("0.16.")
    assert {"cuda", "transformer-engine", "apex", "dali", "psutil", "slurm"} <= set(diagnosis.found)
    assert diagnosis.warnings == []


def test_what_the_shell_would_hand_on_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "OMP_PROC_BIND": "true", "TMPDIR": "/nowhere"}.items():
        monkeypatch.setenv(name, value)
    diagnosis = diagnose()
    assert f"of {os.cpu_count()})" in diagnosis.found["here"]
    assert {"OMP_PROC_BIND=true", "RANK=0"} <= set(diagnosis.found["variables"].split(", "))
    launcher, pins, tmp = diagnosis.warnings
    assert launcher == "RANK: left by another launcher; train and submit take none of it"
    assert pins.startswith("OMP_PROC_BIND: would bind the threads of all ranks")
    assert tmp.startswith("TMPDIR=/nowhere")


def test_unrelated_package_named_apex_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_apex(monkeypatch, tmp_path, "0.9.10.dev0")
    diagnosis = diagnose()
    assert diagnosis.found["apex"] == "0.9.10.dev0, an unrelated project"
    (warning,) = diagnosis.warnings
    assert "not NVIDIA's Apex: pip uninstall apex" in warning


def test_nvidias_apex_is_told_apart_by_its_normalization(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "normalization").mkdir()
    pretend_apex(monkeypatch, tmp_path, "0.1")
    diagnosis = diagnose()
    assert diagnosis.found["apex"].startswith("0.1, NVIDIA's")
    assert diagnosis.warnings == []


def test_recipe_adds_its_modules_ranks_and_missing_tokenizer(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, "parallel.tensor_model_parallel_size=2")
    diagnosis = diagnose(recipe)
    assert diagnosis.found["ranks"] == "2 hold one model; start 2 or a multiple of it"
    assert "core_attention" in diagnosis.modules
    assert any("data/tokenizer.model does not exist" in text for text in diagnosis.warnings)


def test_json_and_text_say_the_same(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path)
    fields = json.loads(doctor(recipe, as_json=True))
    text = doctor(recipe)
    for fact in [*fields["found"].values(), *fields["modules"].values(), *fields["warnings"]]:
        assert fact in text


def test_slurm_is_found_by_its_sbatch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\necho slurm 24.05.1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert diagnose().found["slurm"] == f"slurm 24.05.1 ({sbatch})"


def test_slurm_that_does_not_answer_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def hang(*arguments: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("sbatch", 10)

    monkeypatch.setattr(under_test.shutil, "which", lambda name: "/usr/bin/sbatch")
    monkeypatch.setattr(under_test.subprocess, "run", hang)
    assert "does not answer" in under_test._slurm()
