"""What makes two recipes the same run, and what may change between a save and its resume."""

from pathlib import Path

import pytest

from megatron_curr.recipe.load import load_recipe, recipe_differences, recipe_fingerprint
from tests.recipe.recipes import SOUND, sound_recipe, write_recipe

DECISIVE = [
    "seed=1",
    "model.rotary_base=5e5",
    "data.isolate_documents=true",
    "curriculum.phases.1.tokens=900k",
    "optimizer.adam_beta2=0.99",
    "training.precision=fp32",
]
FREE = [
    "parallel.micro_batch_tokens=512",
    "checkpoint.every_tokens=1M",
    "evaluation.every_tokens=1M",
    "logging.tensorboard=true",
    "run_folder=elsewhere",
    "training.max_nonfinite_steps=9",
]


@pytest.mark.parametrize("override", DECISIVE)
def test_change_of_what_is_trained_changes_the_fingerprint_and_is_refused(
    tmp_path: Path, override: str
) -> None:
    old, new = sound_recipe(tmp_path), sound_recipe(tmp_path, override)
    assert recipe_fingerprint(old) != recipe_fingerprint(new)
    (difference,) = recipe_differences(old, new)
    assert difference.path == override.partition("=")[0]
    assert not difference.allowed
    assert str(difference).endswith("put the old value back, or start a new run under another name")


@pytest.mark.parametrize("override", FREE)
def test_change_of_how_it_is_run_keeps_the_fingerprint_and_is_allowed(
    tmp_path: Path, override: str
) -> None:
    old, new = sound_recipe(tmp_path), sound_recipe(tmp_path, override)
    assert recipe_fingerprint(old) == recipe_fingerprint(new)
    (difference,) = recipe_differences(old, new)
    assert difference.allowed


def test_another_name_is_another_run(tmp_path: Path) -> None:
    (difference,) = recipe_differences(sound_recipe(tmp_path), sound_recipe(tmp_path, "name=b"))
    assert (difference.old, difference.new, difference.allowed) == ("small", "b", False)


def test_equal_recipes_have_no_difference(tmp_path: Path) -> None:
    assert recipe_differences(sound_recipe(tmp_path), sound_recipe(tmp_path)) == []


def test_added_phase_shows_each_of_its_values(tmp_path: Path) -> None:
    old = sound_recipe(tmp_path)
    phase = "    - {name: third, tokens: 1k, seq_length: 256}\nparallel:"
    new = load_recipe(write_recipe(tmp_path, SOUND.replace("parallel:", phase)))
    differences = recipe_differences(old, new)
    assert [(d.path, d.old, d.new) for d in differences][:2] == [
        ("curriculum.phases.2.name", None, "third"),
        ("curriculum.phases.2.tokens", None, 1000),
    ]


def test_writing_the_presets_numbers_out_is_no_change(tmp_path: Path) -> None:
    old = sound_recipe(tmp_path)
    numbers = old.model.model_dump(exclude={"preset"}, exclude_none=True)
    new = sound_recipe(tmp_path, f"model={numbers}".replace("False", "false").replace("'", ""))
    assert new.model.preset is None
    assert recipe_differences(old, new) == []
    assert recipe_fingerprint(old) == recipe_fingerprint(new)


def test_order_of_keys_in_the_file_does_not_matter(tmp_path: Path) -> None:
    first = recipe_fingerprint(sound_recipe(tmp_path))
    flipped = SOUND.replace("{prose: 3, code: 1}", "{code: 1, prose: 3}")
    assert recipe_fingerprint(load_recipe(write_recipe(tmp_path, flipped))) == first
