from __future__ import annotations

from pathlib import Path

import pytest

from megatron_curr.recipe.context_rules import hierarchical_sizes
from tests.recipe.recipes import SOUND, only_refusal, sound_recipe

HEADS = SOUND.replace("preset: demo", "preset: demo, num_attention_heads: 8, num_query_groups: 4")
KIND = "parallel.context_parallel_exchange"


def override(**settings: object) -> list[str]:
    return [f"parallel.{name}={value}" for name, value in settings.items()]


def refusal(folder: Path, **settings: object) -> str:
    return only_refusal(folder, *override(**settings), text=HEADS)


def test_all_to_all_divides_the_key_value_heads_of_a_tensor_rank(tmp_path: Path) -> None:
    line = refusal(
        tmp_path,
        tensor_model_parallel_size=2,
        context_parallel_size=4,
        context_parallel_exchange="a2a",
    )
    assert KIND in line
    assert line.endswith(
        "context_parallel_size 4 does not divide the 2 of a tensor rank (model.num_query_groups 4 "
        "/ tensor 2); use 'p2p' or 'a2a+p2p', or context_parallel_size 1 or 2"
    )


def test_hierarchy_needs_a_smaller_all_to_all(tmp_path: Path) -> None:
    line = refusal(tmp_path, context_parallel_size=2, context_parallel_exchange="a2a+p2p")
    assert KIND in line and line.endswith("there is none: use 'p2p' or 'a2a'")


def test_sizes_of_the_hierarchy_are_named_where_they_do_not_fit(tmp_path: Path) -> None:
    line = refusal(
        tmp_path,
        context_parallel_size=8,
        context_parallel_exchange="a2a+p2p",
        hierarchical_context_parallel_sizes="[8, 2]",
    )
    assert "found [8, 2]; the product must be context_parallel_size 8" in line
    assert line.endswith("use [4, 2] or [2, 4], or leave it out for [4, 2]")


@pytest.mark.parametrize(
    ("given", "sizes"), [({}, [4, 2]), ({"hierarchical_context_parallel_sizes": "[2, 4]"}, [2, 4])]
)
def test_hierarchy_has_the_largest_all_to_all_unless_told(
    tmp_path: Path, given: dict[str, str], sizes: list[int]
) -> None:
    recipe = sound_recipe(
        tmp_path,
        "model.num_attention_heads=8",
        "model.num_query_groups=4",
        *override(context_parallel_size=8, context_parallel_exchange="a2a+p2p", **given),
    )
    assert hierarchical_sizes(recipe.model, recipe.parallel) == sizes


def test_exchange_does_not_matter_on_one_context_rank(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, *override(context_parallel_exchange="a2a+p2p"))
    assert hierarchical_sizes(recipe.model, recipe.parallel) is None
