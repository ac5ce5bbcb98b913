"""What to sample, and the ways to that published models were made for."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from megatron_curr.errors import DataError


@dataclass(frozen=True, slots=True)
class Wish:
    """What to sample; recorded beside the clips."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    prompt_suffix: str = ""
    """Goes behind every prompt, not behind the negative one."""
    image: Path | None = None
    bucket: str | None = None
    """By its name in a run's recipe; None: the largest."""
    size: tuple[int, int, int] | None = None
    """Pixels and frames: height, width, frames. For a model without a recipe, or instead."""
    num_steps: int = 25
    guidance: float = 4.0
    shift: float | None = None  # None: as trained
    fps: float | None = None  # None: the shards' rate
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("no prompt: give --prompt")
        if self.num_steps < 1 or self.batch < 1:
            raise DataError(f"steps {self.num_steps}, batch {self.batch}: must be 1 or more")


def make_wish(preset: str | None = None, **given: Any) -> Wish:
    """A ``Wish`` of what is not None, then of the preset, then of the defaults.

    Raises ``DataError`` for a preset that is not there, naming the nearest.
    """
    values = dict(_preset(preset)) if preset else {}
    values |= {name: value for name, value in given.items() if value is not None}
    if given.get("bucket") is not None:
        values.pop("size", None)
    return Wish(**values)


def preset_names() -> list[str]:
    """Every way that has a name."""
    return list(_presets())


def _preset(name: str) -> dict[str, Any]:
    if name not in _presets():
        close = get_close_matches(name, _presets(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(_presets())}"
        raise DataError(f"no preset {name!r} of sampling; {hint}")
    return _presets()[name]


@cache
def _presets() -> dict[str, dict[str, Any]]:
    text = files(__package__).joinpath("presets.yaml").read_text(encoding="utf-8")
    read: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return {name: {**values, "size": tuple(values["size"])} for name, values in read.items()}
