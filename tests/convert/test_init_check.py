"""A run that begins at published weights is compared as convert compares, before ranks start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from megatron_curr.convert.init_check import check_first_weights
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.tokenizer import write_tokenizer
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.load import load_recipe
from tests.convert.saved_runs import VOCAB_SIZE as TOKENS
from tests.convert.saved_runs import write_corpus
from tests.convert.toy_models import TOYS, save_toy
from tests.training.tiny import recipe_values

MODEL = {"num_layers": 2, "num_query_groups": 4, "ffn_hidden_size": 48, "layernorm_epsilon": 1e-6}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture
def published(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with the corpus' tokenizer as Hugging Face files."""
    kind, fields = TOYS["llama2"]
    monkeypatch.setitem(TOYS, "llama2", (kind, {**fields, "vocab_size": TOKENS}))
    save_toy("llama2", tmp_path / "llama")
    write_tokenizer(corpus / "tokenizer.model", tmp_path / "llama", max_tokens=64)
    return tmp_path / "llama"


def checked(corpus: Path, published: Path, **data: Any) -> tuple[str, ...]:
    values = recipe_values(corpus, published.parent / "run")
    values["model"] |= MODEL
    values["data"] |= data
    values["init_from"] = f"hf:{published}"
    path = published.parent / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return check_first_weights(load_recipe(path), vocab_size=TOKENS)


def test_the_same_tokenizer_and_model_are_proven(corpus: Path, published: Path) -> None:
    (told,) = checked(corpus, published)
    assert f"init_from: {published}: 64 tokens through both models: logits differ by" in told
    assert "next token the same in 100.00%" in told


def test_a_tokenizer_whose_ids_mean_other_texts_is_refused(corpus: Path, published: Path) -> None:
    document = json.loads((published / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = (list(vocabulary)[at] for at in (275, 290))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (published / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=r"token 275 is .*, and .* in .*tokenizer\.json, with wh"):
        checked(corpus, published)


def test_texts_that_are_cut_otherwise_and_a_missing_tokenizer_warn(
    corpus: Path, published: Path
) -> None:
    document = json.loads((published / "tokenizer.json").read_text())
    document["model"]["merges"] = document["model"]["merges"][5:]
    (published / "tokenizer.json").write_text(json.dumps(document))
    assert "cuts texts in another way than" in checked(corpus, published)[0]
    for name in ("tokenizer.json", "tokenizer.model"):
        (published / name).unlink()
    assert "has no tokenizer that can be read here" in checked(corpus, published)[0]


def test_a_tokenizer_that_adds_tokens_is_the_same(corpus: Path, published: Path) -> None:
    more = shutil.copytree(published, published.parent / "more")
    backend = Backend.from_file(str(more / "tokenizer.json"))
    backend.add_tokens(["<tool>"])
    backend.save(str(more / "tokenizer.json"))
    assert load_tokenizer(more).vocab_size == TOKENS + 1
    (told,) = checked(corpus, published, tokenizer=str(more))
    assert "tokens through both models" in told


def test_weights_that_transformers_reads_otherwise_are_refused(
    corpus: Path, published: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_curr.convert import verify

    def other_model(folder: Path, source: Any) -> Any:
        changed = shutil.copytree(folder, folder.parent / "changed")
        tensors = load_file(changed / "model.safetensors")
        tensors["model.layers.1.self_attn.k_proj.weight"].mul_(1.01)
        save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
        return real(changed, source)

    real = verify.published_model
    monkeypatch.setattr(verify, "published_model", other_model)
    with pytest.raises(CheckpointError, match="our model is not the published one: 64 tokens"):
        checked(corpus, published)


def test_a_converted_checkpoint_keeps_its_tokenizer_to_compare(
    corpus: Path, published: Path
) -> None:
    run_conversion(published, published.parent / "converted", verify=False)
    checked(corpus, published)
    recipe = yaml.safe_load((published.parent / "recipe.yaml").read_text())
    recipe["init_from"] = f"checkpoint:{published.parent / 'converted'}"
    path = published.parent / "second.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert check_first_weights(load_recipe(path), vocab_size=TOKENS) == ()
    (published.parent / "converted" / "published" / "tokenizer.json").unlink()
    (published.parent / "converted" / "published" / "tokenizer.model").unlink()
    (warning,) = check_first_weights(load_recipe(path), vocab_size=TOKENS)
    assert "has no tokenizer that can be read here" in warning
