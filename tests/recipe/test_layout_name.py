"""Layouts by name: what a name means, and what is said about one that does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.layout_name import check_layouts, name_of, parse_layout
from megatron_curr.recipe.schema import Recipe
from tests.recipe.recipes import sound_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return sound_recipe(
        tmp_path,
        "parallel.tensor_model_parallel_size=2",
        "parallel.recompute_granularity=full",
        "parallel.recompute_num_layers=2",
    )


def settings(name: str, recipe: Recipe) -> dict[str, object]:
    """What a layout sets apart from a recipe that splits nothing."""
    plain = parse_layout("1", recipe).parallel.model_dump()
    named = parse_layout(name, recipe).parallel.model_dump()
    return {field: value for field, value in named.items() if value != plain[field]}


def test_parts_of_a_name_come_in_any_order(recipe: Recipe) -> None:
    expected = {
        "tensor_model_parallel_size": 2,
        "context_parallel_size": 4,
        "sequence_parallel": True,
    }
    for name in ("tp2cp4sp", "sp-cp4-tp2", "cp4_tp2sp"):
        assert settings(name, recipe) == expected
        assert parse_layout(name, recipe).num_ranks == 8


@pytest.mark.parametrize(
    ("name", "expected", "num_ranks"),
    [
        ("1", {}, 1),
        (
            "pp2vpp2",
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
            2,
        ),
        ("cp2a2a", {"context_parallel_size": 2, "context_parallel_exchange": "a2a"}, 2),
        ("dp4do", {"use_distributed_optimizer": True}, 4),
        (
            "dp2doov",
            {
                "use_distributed_optimizer": True,
                "overlap_grad_reduce": True,
                "overlap_param_gather": True,
            },
            2,
        ),
        (
            "pp4first1",
            {"pipeline_model_parallel_size": 4, "num_layers_in_first_pipeline_stage": 1},
            4,
        ),
        ("rcsel", {"recompute_granularity": "selective", "recompute_num_layers": None}, 1),
        ("ep2", {"expert_model_parallel_size": 2}, 2),
        ("tp2ep2etp1", {
            "tensor_model_parallel_size": 2,
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
        }, 2),
    ],
)  # fmt: skip
def test_a_name_sets_what_it_says_on_the_fewest_ranks(
    recipe: Recipe, name: str, expected: dict[str, object], num_ranks: int
) -> None:
    assert settings(name, recipe) == expected
    assert parse_layout(name, recipe).num_ranks == num_ranks


def test_the_recipe_is_a_layout_too(recipe: Recipe) -> None:
    layout = parse_layout("recipe", recipe)
    assert (layout.parallel, layout.num_ranks) == (recipe.parallel, 2)


@pytest.mark.parametrize(
    "name", ["1", "tp2cp4ringsp", "pp2vpp2", "dp4do", "tp2ep4etp1", "pp4first1"]
)
def test_a_layout_is_named_back(recipe: Recipe, name: str) -> None:
    layout = parse_layout(name, recipe)
    again = parse_layout(name_of(layout.parallel, layout.num_ranks), recipe)
    assert (again.parallel, again.num_ranks) == (layout.parallel, layout.num_ranks)


@pytest.mark.parametrize("name", ["tp2xy", "tp0", "", "2tp", "tp"])
def test_a_name_that_means_nothing_is_refused(recipe: Recipe, name: str) -> None:
    with pytest.raises(RecipeError, match="write one such as tp2sp"):
        parse_layout(name, recipe)


def test_a_size_the_recipe_cannot_hold_is_refused_in_its_words(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"layout pp2vpp1: virtual_pipeline.* greater than 1"):
        parse_layout("pp2vpp1", recipe)


def test_every_layout_that_does_not_fit_is_refused_with_those_that_do(recipe: Recipe) -> None:
    layouts = [parse_layout(name, recipe) for name in ("tp2", "tp3", "pp3dp2")]
    with pytest.raises(RecipeError) as caught:
        check_layouts(layouts, recipe)
    tensor, pipeline = str(caught.value).split("\nlayout pp3dp2: ")
    assert tensor.startswith("layout tp3: parallel.tensor_model_parallel_size: found 3; ")
    assert "layouts that fit, nearest first: " in tensor and "tp2" in tensor
    assert "does not divide model.num_layers" in pipeline and "nearest first: " in pipeline


def test_ranks_that_do_not_share_the_batch_are_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"layout dp3: .*must be a multiple of 3_072"):
        check_layouts([parse_layout("dp3", recipe)], recipe)


def test_a_vocabulary_that_would_be_padded_otherwise_is_refused(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, "model.make_vocab_size_divisible_by=129")
    with pytest.raises(RecipeError, match=r"make_vocab_size_divisible_by: .* set it to 258"):
        check_layouts([parse_layout("tp2", recipe)], recipe)
