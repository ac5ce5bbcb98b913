"""The model card of an export tells what the run was, and no more."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from megatron_curr.convert.export import export
from megatron_curr.convert.source import open_source
from megatron_curr.curriculum.ledger import amend, open_ledger
from megatron_curr.recipe.load import load_recipe
from tests.convert.saved_runs import save_run, write_corpus


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    return save_run(corpus, tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def own_run(plain_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain_run, tmp_path / "run")


def card_of(run: Path, output: Path) -> str:
    export(open_source(run), output)
    return (output / "README.md").read_text()


def test_model_card_tells_the_run(plain_run: Path, tmp_path: Path) -> None:
    card = card_of(plain_run, tmp_path / "hf")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| prose | 4,096 | 100.0% | 0.51 | 4.250 |" in card
    assert "| short | 4,096 | 32 | 256 | 0 → 0.003 | prose 100.0% |" in card
    assert "| mixed |" not in card  # the checkpoint has not reached it
    assert "4,096 tokens of the 8,192" in card
    assert "AutoModelForCausalLM" in card
    assert "gradients clipped at 1.0" in card
    for name in ("mixture", "train_loss", "heldout_loss"):
        assert f"](plots/{name}.svg)" in card
        root = ElementTree.parse(tmp_path / "hf" / "plots" / f"{name}.svg").getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"


def test_the_card_tells_first_weights_and_amendments(own_run: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((own_run / "recipe.yaml").read_text())
    recipe |= {"init_from": "hf:/models/Own-1B", "init_new_tokens": "mean"}
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ledger = open_ledger(load_recipe(own_run / "recipe.yaml").curriculum)
    for start, rate in ((2048, 1e-3), (6144, 2e-3)):
        recipe["curriculum"]["phases"][0]["learning_rate"] = rate
        (tmp_path / "amended.yaml").write_text(yaml.safe_dump(recipe))
        amended = load_recipe(tmp_path / "amended.yaml").curriculum
        ledger = amend(ledger, amended, from_tokens=start, reason="rate too high")
    (own_run / "ledger.jsonl").write_text("".join(entry.line() + "\n" for entry in ledger))
    card = card_of(own_run, tmp_path / "hf")
    assert "begun at the weights of `hf:/models/Own-1B` (rows of new tokens: mean)" in card
    assert "trained further on\n4,096 tokens" in card and "from scratch" not in card
    assert "* from token 2,048 on (rate too high): learning_rate: 0.003 -> 0.001" in card
    assert "6,144" not in card  # after the checkpoint
