"""A small sound recipe in YAML, and ways to break it."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.nearest_layouts import HEADING
from megatron_curr.recipe.schema import Recipe

SOUND = """\
name: small
model: {preset: demo}
data:
  tokenizer: data/tokenizer.model
  sources:
    prose: {shards: data/prose}
    code: {shards: data/code}
curriculum:
  phases:
    - name: short
      tokens: 400k
      seq_length: 128
      mixture: {prose: 3, code: 1}
      global_batch_tokens: 4096
      learning_rate: {from: 0, to: 3e-4, over: 100k}
    - name: mixed
      tokens: 800k
      seq_length: 256
      mixture: {to: {prose: 1, code: 1}}
      global_batch_tokens: {to: 8192, increment: 1024}
parallel: {micro_batch_tokens: 1024}
checkpoint: {every_tokens: 100k}
evaluation: {every_tokens: 100k}
"""


def write_recipe(folder: Path, text: str = SOUND) -> Path:
    """The text as ``recipe.yaml``."""
    file = folder / "recipe.yaml"
    file.write_text(text)
    return file


def sound_recipe(folder: Path, *overrides: str) -> Recipe:
    """The sound recipe, changed."""
    return load_recipe(write_recipe(folder), overrides)


def refusal_of(folder: Path, *overrides: str, text: str = SOUND) -> list[str]:
    """The lines of the error that loading must end in, without the folder's path.

    The layouts it suggests are left out.
    """
    file = write_recipe(folder, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    lines = str(caught.value).replace(f"{folder}/", "").splitlines()
    return lines[: lines.index(HEADING)] if HEADING in lines else lines


def only_refusal(folder: Path, *overrides: str, text: str = SOUND) -> str:
    """The one line of the error that loading must end in, without the override that caused it."""
    lines = refusal_of(folder, *overrides, text=text)
    assert len(lines) == 1, lines
    line = lines[0]
    for override in overrides:
        line = line.removeprefix(f"--set {override}: ")
    return line


def with_keys_shuffled(value: Any, random: Random) -> Any:
    """The same value with the keys of every mapping in it in another order; lists as they are."""
    if isinstance(value, list):
        return [with_keys_shuffled(item, random) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    random.shuffle(keys)
    return {key: with_keys_shuffled(value[key], random) for key in keys}
