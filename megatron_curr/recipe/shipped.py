"""Find a recipe that comes with the package, in a source tree as well as in an installed wheel."""

from __future__ import annotations

from pathlib import Path

import megatron_curr
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.problems import did_you_mean


def shipped_recipe(name: str) -> Path:
    """The path of ``configs/<name>``, such as ``demo_text.yaml``.

    A wheel installs the folder ``configs`` as ``megatron_curr/configs``.
    """
    package = Path(megatron_curr.__file__).parent
    folders = [package.parent / "configs", package / "configs"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    names = sorted({file.name for folder in folders for file in folder.glob("*.yaml")})
    raise RecipeError(f"{name}: no such recipe here; {did_you_mean(name, names, what='recipes')}")
