from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from megatron_curr.recipe.kinds import kind_of, recipe_json_schema
from megatron_curr.recipe.presets import TEXT_PRESETS, VIDEO_PRESETS, preset_names
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.section import Section
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.recipe.yaml_lines import parse_yaml
from tests.curriculum.video_curricula import video_recipe
from tests.recipe.recipes import SOUND

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_json_schema()


def mistakes(schema: dict[str, Any], data: Any) -> list[str]:
    return [error.json_path for error in Draft202012Validator(schema).iter_errors(data)]


def read(text: str) -> Any:
    return parse_yaml(text, "recipe.yaml")[0]


def test_schema_is_one_and_names_its_dialect(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_schema_accepts_every_shipped_recipe(schema: dict[str, Any], file: Path) -> None:
    assert mistakes(schema, read(file.read_text())) == []


def test_schema_accepts_every_way_to_write_a_recipe(schema: dict[str, Any]) -> None:
    assert mistakes(schema, read(SOUND)) == []
    for before, after in [
        ("seq_length: 128", "seq_length: 4k"),
        ("tokens: 400k", "tokens: 4e5"),
        ("tokens: 400k", 'tokens: "1_000 K"'),
        ("checkpoint: {every_tokens: 100k}\n", ""),
        ("evaluation: {every_tokens: 100k}\n", "evaluation: {tokens_per_source: 1k}\n"),
        ("checkpoint: {every_tokens: 100k}\n", "checkpoint: {keep_last: 4}\n"),
        ("mixture: {prose: 3, code: 1}", "mixture: [{from: {prose: 1}, to: {code: 1}, over: 1k}]"),
    ]:
        assert before in SOUND
        assert mistakes(schema, read(SOUND.replace(before, after))) == [], after


@pytest.mark.parametrize(
    ("before", "after", "place"),
    [
        ("preset: demo", "preset: demmo", "$.model.preset"),
        ("name: small", "naem: small", "$"),
        ("tokens: 400k", "tokens: 400q", "$.curriculum.phases[0].tokens"),
        ("seq_length: 128", "seq_length: 4T", "$.curriculum.phases[0].seq_length"),
        ("preset: demo", "preset: dit_1b", "$.data.sources.prose"),  # of a video recipe, then
    ],
)
def test_schema_points_at_a_mistake(
    schema: dict[str, Any], before: str, after: str, place: str
) -> None:
    assert place in mistakes(schema, read(SOUND.replace(before, after)))


def test_schema_knows_the_kind_by_the_model_as_loading_does(schema: dict[str, Any]) -> None:
    phase = {"name": "p", "tokens": 960, "global_batch_tokens": 96, "learning_rate": 1.0}
    mixtures = {"mixture": {"a": 1.0}, "buckets": {"image": 1.0}}
    recipe = video_recipe([{**phase, **mixtures}])
    video = recipe.model_dump(mode="json", by_alias=True)
    assert kind_of(video) is VideoRecipe
    assert mistakes(schema, video) == []
    text = read(SOUND)
    assert kind_of(text) is Recipe
    assert mistakes(schema, {**video, "model": text["model"]})


def test_schema_lists_the_presets_of_its_kind(schema: dict[str, Any]) -> None:
    for model, file in (("Model", TEXT_PRESETS), ("VideoDiT", VIDEO_PRESETS)):
        preset = schema["$defs"][model]["properties"]["preset"]
        assert preset["anyOf"][0]["enum"] == preset_names(file)


def sections(kind: type[BaseModel]) -> set[type[BaseModel]]:
    return {kind}.union(*(sections(child) for child in kind.__subclasses__()))


def test_every_key_of_a_recipe_says_what_it_is(schema: dict[str, Any]) -> None:
    silent = [
        f"{name}.{key}"
        for name, section in schema["$defs"].items()
        for key, field in section.get("properties", {}).items()
        if not field.get("description")
    ]
    assert silent == []
    known = {kind.__name__ for kind in sections(Section)}
    assert (
        {"Recipe", "VideoRecipe", "Phase", "VideoPhase", "Piece"} <= set(schema["$defs"]) <= known
    )
