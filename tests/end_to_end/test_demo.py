"""The whole demo on a smaller recipe, and again over what it left."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from rich.console import Console

import launch.demo as demo_module
from launch.demo import Demo, DemoFailed, data_is_whole, middle_of_ramp, run_demo
from megatron_curr.errors import DataError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.shipped import shipped_recipe


@pytest.fixture
def small_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    values = yaml.safe_load(shipped_recipe("demo_text.yaml").read_text())
    values["model"].update(num_layers=2, hidden_size=64, num_attention_heads=2, kv_channels=32)
    for phase, tokens in zip(values["curriculum"]["phases"], (8192, 16384, 8192), strict=True):
        phase["tokens"] = tokens
    values["curriculum"]["phases"][0]["learning_rate"] = 1e-3
    values["curriculum"]["phases"][1]["global_batch_tokens"]["over"] = 8192
    values["evaluation"] = {"every_tokens": 8192, "tokens_per_source": 1024}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr(demo_module, "shipped_recipe", lambda name: path)
    return path


@pytest.mark.slow
def test_the_demo_runs_through_and_again(
    small_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here"
    assert run_demo(folder) == 0
    told = capfd.readouterr().out
    for step in range(1, 7):
        assert f"step {step} of 6" in told
    assert "largest logit difference" in told
    assert "19 steps agree, tokens 0 to 31,744" in told
    run = folder / "runs" / "demo_text"
    assert (run / "report.html").stat().st_size > 50_000
    assert (run / "hf" / "model.safetensors").is_file()
    assert "resumed" in (run / "report.html").read_text()

    assert run_demo(folder) == 0
    told = capfd.readouterr().out
    assert "is there already and left as it is" in told
    assert told.count("already") == 3  # data, first half, second half
    assert "written anew" in told


def test_the_ramp_is_stopped_in_its_middle() -> None:
    recipe = load_recipe(shipped_recipe("demo_text.yaml"))
    short, mixed, _ = recipe.curriculum.phases
    assert middle_of_ramp(recipe) == short.tokens + mixed.tokens // 2


def test_a_step_that_fails_is_named() -> None:
    demo = Demo(Path(), console=Console(file=io.StringIO()))
    with pytest.raises(DataError, match=r"step 1 of 6 \(shards\): bad"), demo.telling("shards"):
        raise DataError("bad file")
    with pytest.raises(DemoFailed, match="step 2 of 6"), demo.telling("training"):
        raise DemoFailed("exit code 1")
    with pytest.raises(ZeroDivisionError) as found, demo.telling("a bug"):
        raise ZeroDivisionError
    assert found.value.__notes__ == ["in the demo, step 3 of 6 (a bug)"]


def test_missing_or_foreign_data_is_made_again(tmp_path: Path) -> None:
    assert not data_is_whole(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    assert not data_is_whole(tmp_path)
