"""The toy run of the cluster tests: two phases, 72 steps that are slow enough to be hit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.training.tiny import recipe_values, write_recipe

STEPS = 72


def toy_values(corpus: Path, run_folder: Path) -> dict[str, Any]:
    """2 layers, 32 wide; 48 steps of 32-token samples, then 24 of 64-token ones."""
    values = recipe_values(corpus, run_folder)
    values["name"] = run_folder.name
    values["model"]["num_layers"] = 2
    short, mixed = values["curriculum"]["phases"]
    short.update(tokens=48 * 1024, global_batch_tokens=1024)
    short["learning_rate"]["over"] = 8192
    mixed.update(tokens=24 * 2048, global_batch_tokens=2048)
    mixed["mixture"]["over"] = 16_384
    values["parallel"] = {"micro_batch_tokens": 64}
    values["checkpoint"] = {"every_tokens": 8192, "keep_last": 3}
    values["evaluation"] = {"every_tokens": 65_536, "tokens_per_source": 512}
    return values


def write_toy(corpus: Path, run_folder: Path, /, **changes: Any) -> Path:
    """The recipe beside the run's folder."""
    values = {**toy_values(corpus, run_folder), **changes}
    return write_recipe(run_folder.with_suffix(".yaml"), values)
