from pathlib import Path

import pytest

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.check import check_layout, recipe_problems
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.nearest_layouts import HEADING, nearest_layouts
from tests.recipe.recipes import sound_recipe, write_recipe

PIPELINE = "parallel.pipeline_model_parallel_size"
TENSOR = "parallel.tensor_model_parallel_size"
CONTEXT = "parallel.context_parallel_size"
EXPERTS = ("model.num_moe_experts=6", "parallel.sequence_parallel=false")


def suggestions(folder: Path, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(folder), overrides)
    lines = str(caught.value).splitlines()
    assert HEADING in lines, lines
    return [line.strip() for line in lines[lines.index(HEADING) + 1 :]]


@pytest.mark.parametrize(
    ("broken", "nearest"),
    [
        ([f"{TENSOR}=4"], f"--set {TENSOR}=2"),
        ([f"{CONTEXT}=3"], f"--set {CONTEXT}=4"),
        ([f"{PIPELINE}=3"], "--set parallel.num_layers_in_last_pipeline_stage=2"),
        (["parallel.sequence_parallel=true"], "--set parallel.sequence_parallel=false"),
        (
            [f"{PIPELINE}=2", "parallel.virtual_pipeline_model_parallel_size=3"],
            "--set parallel.virtual_pipeline_model_parallel_size=2",
        ),
        (
            [*EXPERTS, "parallel.expert_model_parallel_size=4"],
            "--set parallel.expert_model_parallel_size=3",
        ),
        ([*EXPERTS, f"{TENSOR}=2"], "--set parallel.sequence_parallel=true"),
    ],
)
def test_a_layout_the_model_does_not_admit_is_refused_with_the_nearest_that_fit(
    tmp_path: Path, broken: list[str], nearest: str
) -> None:
    lines = suggestions(tmp_path, *broken)
    assert lines[0] == nearest
    assert 1 <= len(lines) <= 3


@pytest.mark.parametrize(
    "broken",
    [[f"{TENSOR}=4"], [f"{PIPELINE}=3"], [*EXPERTS, "parallel.expert_model_parallel_size=4"]],
)
def test_every_suggestion_makes_a_sound_recipe(tmp_path: Path, broken: list[str]) -> None:
    for line in suggestions(tmp_path, *broken):
        settings = [part for part in line.split() if part != "--set"]
        assert not recipe_problems(load_recipe(write_recipe(tmp_path), [*broken, *settings]))


def test_suggestions_run_on_the_ranks_there_are(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, f"{TENSOR}=2", "parallel.sequence_parallel=true")
    overrides = [f"{TENSOR}=2", "parallel.sequence_parallel=true", f"{PIPELINE}=4"]
    with pytest.raises(RecipeError, match="4 ranks cannot hold tensor 2 x pipeline 4") as caught:
        check_layout(sound_recipe(tmp_path, *overrides), 4)
    first = str(caught.value).splitlines()[2]
    assert first.strip() == f"--set {PIPELINE}=2"
    for arguments in nearest_layouts(recipe, 4):
        check_layout(sound_recipe(tmp_path, *overrides[:2], *arguments), 4)


def test_batches_that_do_not_divide_lead_to_layouts_with_fewer_data_parallel_ranks(
    tmp_path: Path,
) -> None:
    with pytest.raises(RecipeError, match="increment: found 1_024") as caught:
        check_layout(sound_recipe(tmp_path), 4)
    assert f"  --set {CONTEXT}=4" in str(caught.value).splitlines()


def test_nothing_is_suggested_where_no_layout_helps(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write_recipe(tmp_path), ["model.num_query_groups=4"])
    assert HEADING not in str(caught.value)


def test_a_thousand_ranks_are_answered_at_once(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, "model.preset=qwen3_30b_a3b", f"{TENSOR}=1")
    problems = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"tensor_model_parallel_size": 32})}
    )
    found = nearest_layouts(problems)
    assert found[0] == [f"{TENSOR}=4", "parallel.sequence_parallel=true"]
