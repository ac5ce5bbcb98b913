"""Training begins at a published model's weights, on any layout, with moments of zero."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_curr.convert.load import first_weights
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from tests.convert.toy_models import VOCAB_SIZE, save_toy
from tests.ranks import run_ranks
from tests.training.tiny import recipe_values

TABLE = "embedding.word_embeddings.weight"
MODEL = {
    "num_layers": 2,
    "num_query_groups": 4,
    "ffn_hidden_size": 48,
    "layernorm_epsilon": 1e-6,
    "vocab_size": VOCAB_SIZE,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "llama"
    save_toy("llama2", folder)
    return folder


def recipe_of(folder: Path, published: Path, **changes: Any) -> Recipe:
    values = recipe_values(folder, folder / "run")
    values["model"] |= {**MODEL, **changes.pop("model", {})}
    values["parallel"] |= changes.pop("parallel", {})
    values |= {"init_from": f"hf:{published}", **changes}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return load_recipe(path)


def weights_begin_as_published(rank: int, recipe_path: str) -> None:
    from megatron_curr.parallel.full_tensors import full_parameters
    from megatron_curr.parallel.groups import build_groups
    from megatron_curr.training.build import build_model

    recipe = load_recipe(Path(recipe_path))
    assert recipe.init_from
    source = open_source(Path(recipe.init_from.partition(":")[2]))
    groups = build_groups(recipe.parallel)
    vocab_size = recipe.model.vocab_size
    assert vocab_size
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=vocab_size)
    drawn = full_parameters(chunks, groups)[TABLE]
    fill = first_weights(recipe, vocab_size=vocab_size)
    assert fill
    fill([chunk.module for chunk in chunks], groups)
    optimizer.reload_model_params()
    # A step of rate zero writes the optimizer's own copy back: it must be the published one, too.
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.step()
    found = full_parameters(chunks, groups)
    names = {"self_attention.linear_qkv.weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
    for name in [f"decoder.layers.{layer}.{name}" for layer in range(2) for name in names]:
        expected = source.weights.read(name)
        assert torch.equal(found[name], expected.to(found[name].dtype)), name
    table = source.weights.read(TABLE)
    rows = found[TABLE]
    assert torch.equal(rows[:VOCAB_SIZE], table.to(rows.dtype))
    mean = table.double().mean(dim=0).to(rows.dtype).expand(vocab_size - VOCAB_SIZE, -1)
    new = rows[VOCAB_SIZE:vocab_size]
    assert torch.equal(
        new, mean if recipe.init_new_tokens == "mean" else drawn[VOCAB_SIZE:vocab_size]
    )
    assert torch.equal(rows[vocab_size:], drawn[vocab_size:])


@pytest.mark.parametrize(
    ("new_tokens", "parallel", "precision"),
    [
        ("mean", {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}, "fp32"),
        ("random", {"pipeline_model_parallel_size": 2}, "bf16"),
    ],
)
def test_weights_are_the_published_ones_and_new_tokens_as_named(
    published: Path, tmp_path: Path, new_tokens: str, parallel: dict[str, Any], precision: str
) -> None:
    recipe_of(
        tmp_path,
        published,
        model={"vocab_size": VOCAB_SIZE + 9},
        init_new_tokens=new_tokens,
        parallel=parallel,
        training={"precision": precision},
    )
    run_ranks(weights_begin_as_published, 2, str(tmp_path / "recipe.yaml"))


def test_another_model_is_refused_by_the_setting(published: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, published, model={"layernorm_epsilon": 1e-5})
    with pytest.raises(RecipeError, match="layernorm_epsilon: found 1e-05"):
        first_weights(recipe, vocab_size=VOCAB_SIZE)
    recipe = recipe_of(tmp_path, published, model={"ffn_hidden_size": 64})
    with pytest.raises(RecipeError, match=r"ffn_hidden_size: found 64; .* made with 48: set that"):
        first_weights(recipe, vocab_size=VOCAB_SIZE)


def test_a_longer_rotation_warns(
    published: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert first_weights(recipe_of(tmp_path, published, model={"rotary_base": 5e5}), vocab_size=250)
    assert "model.rotary_base is 500000.0, and 10000.0 in" in caplog.text


def test_another_vocabulary_needs_a_word(published: Path, tmp_path: Path) -> None:
    message = r"has 250 tokens and the recipe's model 259; .*set in"
    with pytest.raises(CheckpointError, match=message):  # before a model is built
        first_weights(recipe_of(tmp_path, published), vocab_size=VOCAB_SIZE + 9)


def test_the_kind_of_folder_is_checked(published: Path, tmp_path: Path) -> None:
    run_conversion(published, tmp_path / "converted", verify=False)
    recipe = recipe_of(tmp_path, tmp_path / "converted")
    with pytest.raises(RecipeError, match="is no hf folder; write checkpoint:"):
        first_weights(recipe, vocab_size=VOCAB_SIZE)
    recipe = recipe_of(tmp_path, published, init_from=f"checkpoint:{tmp_path / 'converted'}")
    assert first_weights(recipe, vocab_size=VOCAB_SIZE)
    recipe = recipe_of(tmp_path, published, init_from=f"ema:{tmp_path / 'converted'}")
    with pytest.raises(CheckpointError, match="is no run, so it has no average"):
        first_weights(recipe, vocab_size=VOCAB_SIZE)
    with pytest.raises(RecipeError, match="init_from"):
        recipe_of(tmp_path, published, init_from=str(published))
