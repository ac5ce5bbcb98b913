"""``megatron-curr parity`` as a user runs it, and what ranks that fail leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_curr.cli import main
from tests.training.runs import Runs
from tests.training.tiny import write_corpus


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    return Runs(corpus, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def recipe(runs: Runs) -> Path:
    return runs.recipe("asked")


def test_layouts_are_compared_and_the_first_difference_is_named(
    runs: Runs, recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At a tolerance that no sum in another order can hold."""
    arguments = ["parity", str(recipe), "--layouts", "tp2sp,dp2", "--steps", "2"]
    assert main([*arguments, "--tolerance", "1e-12", "--json"]) == 1
    output, errors = capfd.readouterr()
    result = json.loads(output)
    assert (result["reference"], result["num_steps"], result["precision"]) == ("1", 2, "fp32")
    tensor, data = result["layouts"]
    assert (tensor["layout"], tensor["num_ranks"], data["layout"]) == ("tp2sp", 2, "dp2")
    assert not tensor["agrees"]
    assert tensor["largest"]["first weights"]["relative"] == 0.0
    assert 0 < tensor["largest"]["gradients"]["relative"] < 2e-5
    assert tensor["differing"][0]["parameter"] == "embedding.word_embeddings.weight"
    assert "tp2sp differs: gradients of embedding.word_embeddings.weight by " in errors
    assert not (runs.folder / "asked").exists()


def test_one_table_says_that_all_agree(recipe: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["parity", str(recipe), "--layouts", "pp2", "--reference", "dp2do", "--steps", "1"]
    assert main(arguments) == 0
    output = capfd.readouterr().out
    assert "differences from dp2do, 1 steps in fp32, tolerance 2e-05" in " ".join(output.split())
    assert "bit-equal" in output and "equal" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layouts", "tp3"], "layout tp3: parallel.tensor_model_parallel_size: found 3"),
        (["--layouts", "tp2,tq2"], "layout 'tq2': 'tq2' means nothing"),
        (["--layouts", "tp2", "--steps", "25"], "--steps 25: the recipe's run has 24 steps"),
        (["--layouts", "tp2", "--precision", "fp8"], "--precision fp8: must be fp32 or bf16"),
        (["--layouts", "tp2", "--set", "data.sources.prose.shards=none"], "none"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_any_process_starts(
    recipe: Path,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.parity.Crew", None)
    assert main(["parity", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err
