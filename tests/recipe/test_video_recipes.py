"""What a video recipe refuses, by file and line, and what the shipped ones ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_curr.curriculum.lots import VideoPlanner
from megatron_curr.curriculum.schedule import build_schedule
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.check import check_layout
from megatron_curr.recipe.load import dump_recipe, load_recipe, recipe_fingerprint
from megatron_curr.recipe.presets import VIDEO_PRESETS, preset_names
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.recipe.video_model import VideoDiT as dit
from megatron_curr.recipe.video_schema import VideoRecipe
from tests.training.tiny_video import video_recipe_values


def written(folder: Path, changes: dict[str, Any]) -> Path:
    """The tiny recipe with changes by dotted path, as a file."""
    values = video_recipe_values(folder, folder / "run")
    for path, value in changes.items():
        *sections, last = path.split(".")
        target: Any = values
        for section in sections:
            target = target[int(section) if section.isdigit() else section]
        target[last] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_model_decides_the_kind_and_a_dump_loads_again(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, {}))
    assert isinstance(recipe, VideoRecipe)
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    other = load_recipe(again, ["objective.velocity=noise-x0"])
    assert recipe_fingerprint(other) != recipe_fingerprint(recipe)
    assert isinstance(load_recipe(again, ["model.num_layers=3"]), VideoRecipe)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(720, 1280, 90, 160), (832, 1110, 104, 138), (960, 960, 120, 120), (1108, 832, 138, 104)],
)
def test_latents_of_a_size_are_the_release_s(
    tmp_path: Path, height: int, width: int, rows: int, columns: int
) -> None:
    clip = {"height": height, "width": width, "num_frames": 105, "batch_samples": 4}
    recipe = load_recipe(written(tmp_path, {"data.buckets.clip": clip}))
    assert isinstance(recipe, VideoRecipe)
    assert recipe.data.latent_shape("clip") == (14, rows, columns)


def test_presets_of_the_release_round_timesteps_as_it_does() -> None:
    rounded = {name for name in preset_names(VIDEO_PRESETS) if dit(preset=name).round_timesteps}
    assert rounded == {"dit_debug", "dit_1b", "dit_4b", "dit_10b", "dit_18b"}
    assert not dit(preset="dit_10b", round_timesteps=False).round_timesteps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.buckets.clip.height": 4}, "found 4; a latent stands for 8 pixels"),
        ({"data.sources.films.buckets": ["clop"]}, "no bucket 'clop' in data.buckets; did you mea"),
        ({"data.sources.films.buckets": ["clip", "clip"]}, "'clip' is listed twice"),
        ({"curriculum.phases.0.buckets": {"clop": 1.0}}, "no such bucket in data.buckets; did you"),
        ({"curriculum.phases.0.tasks": {"i2w": 1.0}}, "no such task; did you mean 'i2v'"),
        ({"curriculum.phases.0.timestep_shift": -1.0}, "found -1.0; must be 0 or more"),
        ({"curriculum.phases.0.buckets": None}, "buckets: missing; the first phase has no value"),
        ({"model.out_channels": 3}, "the first in_channels 4 of them are the velocity"),
        ({"model.hidden_size": 40}, "must be a multiple of 6"),
        ({"objective": {"velocity": "eps"}}, "must be 'x0-noise' or 'noise-x0'"),
        ({"parallel.virtual_pipeline_model_parallel_size": 2}, "shapes do not interleave"),
        ({"parallel.tensor_model_parallel_size": 3}, "does not divide model.num_attention_heads 4"),
        (
            {"parallel.context_parallel_size": 8, "parallel.context_parallel_exchange": "a2a"},
            "context_parallel_size 8 does not divide the 4 of a tensor rank",
        ),
    ],
)
def test_mistakes_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(written(tmp_path, changes))


def test_ranks_that_cannot_share_a_lot_are_refused_with_those_that_can(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, {"data.buckets.wide.batch_samples": 6}))
    with pytest.raises(RecipeError) as refused:
        check_layout(recipe, 4)
    said = str(refused.value)
    assert "data.buckets.wide.batch_samples: found 6; 4 data-parallel ranks share every lot" in said
    assert "or use 1, 2, 3 or 6 data-parallel ranks" in said
    assert "--set parallel.tensor_model_parallel_size=2" in said


@pytest.mark.parametrize(
    ("name", "ranks", "phases", "tokens"),
    [
        ("mugv_10b_pretrain.yaml", 512, 9, 2843e9),
        ("mugv_10b_finetune.yaml", 64, 2, 800e6),
        ("demo_video.yaml", 2, 3, 1.14e6),
    ],
)
def test_shipped_recipes_compile_and_fit_their_ranks(
    name: str, ranks: int, phases: int, tokens: float
) -> None:
    recipe = load_recipe(shipped_recipe(name))
    check_layout(recipe, ranks)
    schedule = build_schedule(recipe.curriculum, VideoPlanner(recipe))
    assert len(schedule.stretches) == phases
    assert schedule.total_tokens == pytest.approx(tokens, rel=2e-2)
