"""Published architectures by name, so that a recipe says ``preset: llama3_8b``.

The numbers live in ``model_presets.yaml`` (text) and ``video_presets.yaml`` beside this file, each
with its source.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

TEXT_PRESETS = "model_presets.yaml"
VIDEO_PRESETS = "video_presets.yaml"


@cache
def _presets(file: str) -> dict[str, dict[str, Any]]:
    text = files(__package__).joinpath(file).read_text(encoding="utf-8")
    presets: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return presets


def preset_names(file: str = TEXT_PRESETS) -> list[str]:
    """Every preset, in the order of the file."""
    return list(_presets(file))


def model_preset(name: str, file: str = TEXT_PRESETS) -> dict[str, Any]:
    """The fields of one preset. Raises ``ValueError`` that names the nearest one."""
    presets = _presets(file)
    if name not in presets:
        close = get_close_matches(str(name), presets, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known presets: {', '.join(presets)}"
        raise ValueError(f"no model preset {name!r}; {hint}")
    return dict(presets[name])


def architecture_or_preset(file: str, *, has_default: Set[str]) -> Callable[[dict[str, Any]], None]:
    """For the JSON schema of a model: it names one of the presets, or gives its architecture."""

    def describe(schema: dict[str, Any]) -> None:
        required = set(schema.pop("required")) - has_default
        schema["anyOf"] = [{"required": ["preset"]}, {"required": sorted(required)}]
        schema["properties"]["preset"]["anyOf"] = [{"enum": preset_names(file)}, {"type": "null"}]

    return describe
