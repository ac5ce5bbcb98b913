"""The kinds of recipe: which one a file is, and the JSON schema by which an editor knows it."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_schema import VideoRecipe

VIDEO_PREFIX = "dit_"  # of every preset of a video model
_OF_VIDEO_ALONE = sorted(set(VideoDiT.model_fields) - set(Model.model_fields))


def kind_of(data: dict[str, Any]) -> type[Recipe] | type[VideoRecipe]:
    """What the model is: of video where it names a preset or a field that only video has."""
    model = data.get("model")
    if not isinstance(model, dict):
        return Recipe
    is_video = str(model.get("preset")).startswith(VIDEO_PREFIX)
    return VideoRecipe if is_video or not set(_OF_VIDEO_ALONE).isdisjoint(model) else Recipe


def recipe_json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe file. It decides between text and video as ``kind_of`` does.

    So an editor shows the mistakes of the kind that was meant, and not those of both.
    """
    kinds: list[Any] = [(Recipe, "validation"), (VideoRecipe, "validation")]
    _, schema = models_json_schema(kinds, by_alias=True)
    names_video_preset = {
        "properties": {"preset": {"type": "string", "pattern": f"^{VIDEO_PREFIX}"}}
    }
    of_video = [{**names_video_preset, "required": ["preset"]}]
    of_video += [{"required": [name]} for name in _OF_VIDEO_ALONE]
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "megatron_curr recipe",
        "description": "A pretraining run: a text model, or where model says so a video model",
        "type": "object",
        "if": {
            "properties": {"model": {"type": "object", "anyOf": of_video}},
            "required": ["model"],
        },
        "then": {"$ref": "#/$defs/VideoRecipe"},
        "else": {"$ref": "#/$defs/Recipe"},
        "$defs": schema["$defs"],
    }
