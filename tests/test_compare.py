import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_curr.cli import main
from megatron_curr.compare import Comparison, Step, Value, compare
from megatron_curr.curriculum.ledger import open_ledger
from megatron_curr.data.identity import KnownData
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.load import dump_recipe, load_recipe
from tests.recipe.recipes import SOUND


def write(folder: Path, name: str, *changes: tuple[str, str]) -> Path:
    text = SOUND
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


def write_run(recipe: Path, losses: list[float], digests: list[str]) -> Path:
    """A run folder with the recipe's ledger and a row for each loss."""
    run, loaded = recipe.with_suffix(""), load_recipe(recipe)
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(loaded))
    entries = open_ledger(loaded.curriculum)
    (run / "ledger.jsonl").write_text("".join(entry.line() + "\n" for entry in entries))
    rows = [{"step": 0, "consumed_tokens": 0, "eval/prose/loss_nats_per_token": 9.0}]
    rows += [
        {
            "step": step,
            "consumed_tokens": 4096 * step,
            "train/loss_nats_per_token": loss,
            "data/samples_digest": digest,
        }
        for step, (loss, digest) in enumerate(zip(losses, digests, strict=True), start=1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"st')
    return run


def test_recipes_differ_by_key_path_with_defaults_filled_in(tmp_path: Path) -> None:
    a = write(tmp_path, "a")
    b = write(
        tmp_path,
        "b",
        ("name: small", "seed: 7\nname: other"),
        ("seq_length: 128", "seq_length: 256"),
    )
    found = compare(a, b)
    assert found.settings == (
        Value("name", "small", "other"),
        Value("seed", 1234, 7),
        Value("curriculum.phases.0.seq_length", 128, 256),
    )
    assert found.curriculum[0] == "0 to 401,408  seq_length: 128 -> 256"
    assert found.num_steps is None and not found.is_same


def test_spelling_and_names_are_no_difference(tmp_path: Path) -> None:
    a = write(tmp_path, "a")
    b = write(
        tmp_path,
        "b",
        ("400k", "0.4M"),
        ("{prose: 3, code: 1}", "{code: 0.25, prose: 0.75}"),
        ("name: small", "optimizer: {adam_beta1: 0.9}\nname: other"),
    )
    assert [value.path for value in compare(a, b).settings] == ["name"]
    assert compare(a, b).is_same


def test_runs_differ_from_the_first_step_that_does(tmp_path: Path) -> None:
    a = write_run(write(tmp_path, "a"), [9.0, 8.0, 7.5, 7.0], ["aa", "bb", "cc", "dd"])
    b = write_run(write(tmp_path, "b"), [9.0, 8.0, 7.1], ["aa", "bx", "cc"])
    found = compare(a, b)
    assert found.num_steps == 3
    assert found.steps == (
        Step("data/samples_digest", 2, 8192, "bb", "bx"),
        Step("train/loss_nats_per_token", 3, 12288, 7.5, 7.1),
    )
    assert compare(a, a).is_same
    assert "the same samples and losses in all of them" in compare(a, a).as_text()


def test_runs_on_other_bytes_differ_though_the_recipe_is_the_same(tmp_path: Path) -> None:
    a = write_run(write(tmp_path, "a"), [9.0], ["aa"])
    b = write_run(write(tmp_path, "b"), [9.0], ["aa"])
    shared = {"data.sources.code.shards": ("1", "2")}
    (a / "data.json").write_text(
        KnownData("t", {**shared, "data.sources.prose.shards": ("3",)}).text()
    )
    (b / "data.json").write_text(
        KnownData("t", {**shared, "data.sources.prose.shards": ("4",)}).text()
    )
    assert compare(a, b).data == ("data.sources.prose.shards",)
    assert not compare(a, b).is_same
    assert "data.sources.prose.shards: holds other bytes" in compare(a, b).as_text()


def test_command_says_so_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write(tmp_path, "a"), write(tmp_path, "b", ("prose: 3", "prose: 2"))
    assert main(["diff", str(a), str(a)]) == 0
    assert "no difference in what is trained" in capsys.readouterr().out
    assert main(["diff", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["same"] is False
    assert {value["path"] for value in found["settings"]} == {
        "curriculum.phases.0.mixture.prose",
        "curriculum.phases.0.mixture.code",
    }
    assert main(["diff", str(a), str(tmp_path)]) == 2
    assert "recipe.yaml" in capsys.readouterr().err


def test_text_beside_video_differs_in_settings_alone(tmp_path: Path) -> None:
    video = Path(__file__).parents[1] / "configs" / "demo_video.yaml"
    found = compare(write(tmp_path, "a"), video)
    assert isinstance(found, Comparison) and found.curriculum == ()
    assert Value("model.in_channels", None, load_recipe(video).model.in_channels) in found.settings
    with pytest.raises(RecipeError, match="no such file"):
        compare(video, tmp_path / "nope.yaml")


def test_it_starts_without_torch() -> None:
    program = "import sys, megatron_curr.compare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
