"""Read a recipe, override it, write it back, and tell two of them apart.

Every mistake found in the file or in an override is reported at once, each as one line
``file.yaml:12: curriculum.phases.1.tokens: what was found; remedy``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.check import recipe_problems
from megatron_curr.recipe.kinds import kind_of
from megatron_curr.recipe.layout_rules import layout_problems
from megatron_curr.recipe.nearest_layouts import refuse_layout
from megatron_curr.recipe.problems import did_you_mean, problems_of, refusal
from megatron_curr.recipe.schema import Recipe, RunRecipe
from megatron_curr.recipe.section import Section
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.recipe.yaml_lines import Path as KeyPath
from megatron_curr.recipe.yaml_lines import dump_yaml, parse_yaml

AnySection = TypeVar("AnySection", bound=Section)
AnyRecipe = Recipe | VideoRecipe

RUN_RECIPE, RUN_LEDGER = "recipe.yaml", "ledger.jsonl"  # what a run keeps in its folder

DECIDES_WHAT_IS_TRAINED = (
    "seed",
    "model",
    "data",
    "curriculum",
    "optimizer",
    "objective",
    "training.precision",
    "training.ema_decay",
)
MAY_CHANGE_ON_RESUME = (
    "parallel",
    "checkpoint",
    "evaluation",
    "logging",
    "run_folder",
    "training.max_nonfinite_steps",
    "training.hang_step_multiple",
    "training.hang_least_s",
)
# The preset only names where the model's numbers came from; the numbers themselves are compared.
NEVER_COMPARED = ("model.preset",)


@dataclass(frozen=True)
class Difference:
    """One value that two recipes disagree on; ``None`` where one of them has none."""

    path: str
    old: Any
    new: Any
    allowed: bool  # may change between a save and its resume

    def __str__(self) -> str:
        change = f"{self.path}: was {self.old!r}, is {self.new!r}"
        if self.allowed:
            return change
        return f"{change}; put the old value back, or start a new run under another name"


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> AnyRecipe:
    """The recipe in a YAML file, with ``a.b=value`` overrides, checked across its sections.

    A folder stands for the recipe of the run in it. Its model says what kind of run it is. Raises
    ``RecipeError`` that lists everything that is wrong, with its line.
    """
    file = _recipe_of_run(Path(path)) if Path(path).is_dir() else Path(path)
    data, places = _read_mapping(file, overrides, what="recipe")
    recipe = _validated(kind_of(data), data, places)
    if problems := recipe_problems(recipe):
        if layout_problems(recipe):
            raise refuse_layout(recipe, problems, places)
        raise refusal(problems, places)
    is_moved_by_hand = any(override.startswith("run_folder=") for override in overrides)
    return recipe if is_moved_by_hand else _where_it_lies(recipe, file)


def _recipe_of_run(folder: Path) -> Path:
    file = folder / RUN_RECIPE
    if not file.is_file():
        names = sorted(path.name for path in folder.glob("[!.]*.yaml"))
        holds = f"it holds {', '.join(names[:4])}" if names else "and it holds no recipe"
        raise RecipeError(
            f"{folder}: a folder without {RUN_RECIPE}, so not that of a run; {holds}: give a "
            "recipe, a .yaml file, or the folder that a run wrote"
        )
    return file


def _where_it_lies(recipe: AnyRecipe, file: Path) -> AnyRecipe:
    """A run's own recipe speaks of the folder in which it is, wherever that was moved to."""
    folder = file.parent
    if file.name != RUN_RECIPE or not (folder / RUN_LEDGER).is_file():
        return recipe
    if recipe.folder.resolve() == folder.resolve():
        return recipe
    return recipe.model_copy(update={"run_folder": folder})


def load_section(
    kind: type[AnySection], path: str | Path, overrides: Sequence[str] = (), *, what: str
) -> tuple[AnySection, dict[KeyPath, str]]:
    """A YAML file as a typed section, and where in the file or overrides each path was written.

    ``what`` names such a file in messages. Raises ``RecipeError`` that lists every mistake.
    """
    data, places = _read_mapping(path, overrides, what=what)
    return _validated(kind, data, places), places


def _read_mapping(
    path: str | Path, overrides: Sequence[str], *, what: str
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(_no_such_file(file, what)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{file}: not UTF-8 text ({error}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read as a {what}: {error}") from None
    data, lines = parse_yaml(text, str(file))
    if not isinstance(data, dict):
        raise RecipeError(f"{file}:1: a {what} is a mapping of sections; this file holds none")
    places = {key: f"{file}:{line}" for key, line in lines.items()}
    for override in overrides:
        _apply_override(data, override, places=places)
    return data, places


def _validated(
    kind: type[AnySection], data: dict[str, Any], places: dict[KeyPath, str]
) -> AnySection:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise refusal(problems_of(error, kind), places) from None


def dump_recipe(recipe: RunRecipe) -> str:
    """The recipe with every default filled in, as YAML that loads to an equal recipe."""
    return dump_yaml(recipe.model_dump(mode="json", by_alias=True))


def recipe_fingerprint(recipe: RunRecipe) -> str:
    """SHA-256, in hex, of the settings that decide what is trained and on what.

    Layout, cadences and logging do not enter: the same run may resume under others.
    """
    decisive = {
        path: value
        for path, value in _leaves(recipe.model_dump(mode="json", by_alias=True))
        if _under(path, DECIDES_WHAT_IS_TRAINED) and not _under(path, NEVER_COMPARED)
    }
    canonical = json.dumps(decisive, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def recipe_differences(old: RunRecipe, new: RunRecipe) -> list[Difference]:
    """Every value on which the two disagree, in the order of the recipe."""
    before = dict(_leaves(old.model_dump(mode="json", by_alias=True)))
    after = dict(_leaves(new.model_dump(mode="json", by_alias=True)))
    return [
        Difference(
            path,
            before.get(path),
            after.get(path),
            allowed=_under(path, MAY_CHANGE_ON_RESUME),
        )
        for path in dict.fromkeys([*before, *after])
        if before.get(path) != after.get(path) and not _under(path, NEVER_COMPARED)
    ]


def _under(path: str, prefixes: Sequence[str]) -> bool:
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar (and every empty container) with its dotted path."""
    if isinstance(value, dict) and value:
        children: Any = value.items()
    elif isinstance(value, list) and value:
        children = enumerate(value)
    else:
        yield path, value
        return
    for key, child in children:
        yield from _leaves(child, f"{path}.{key}" if path else str(key))


def _no_such_file(file: Path, what: str) -> str:
    folder = file.parent
    names = sorted(entry.name for entry in folder.glob("[!.]*.yaml")) if folder.is_dir() else []
    if names:
        hint = did_you_mean(file.name, names, what=f"{what}s in {folder}")
    else:
        hint = f"there is no {what} in {folder}; give the path of a .yaml file"
    return f"{file}: no such file; {hint}"


def _apply_override(data: dict[str, Any], override: str, *, places: dict[KeyPath, str]) -> None:
    """Put one ``a.b.0=value`` into the data; its place becomes the override itself.

    Names that no section knows are put there as well, so that the schema refuses them with the
    same words as it does in the file.
    """
    where = f"--set {override}"
    name, equals, text = override.partition("=")
    if not equals or not all(name.split(".")):
        raise RecipeError(f"{where}: not an override; write section.key=value")
    try:
        value, _ = parse_yaml(text, where)
    except RecipeError:
        raise RecipeError(f"{where}: {text!r} is not valid YAML; put it in quotes") from None
    *parents, last = name.split(".")
    path: KeyPath = ()
    target: Any = data
    for part in parents:
        key = _key_in(target, part, path=path, where=where)
        if isinstance(target, dict) and target.get(key) is None:
            target[key] = {}
        target, path = target[key], (*path, key)
    key = _key_in(target, last, path=path, where=where)
    target[key] = value
    path = (*path, key)
    for stale in [place for place in places if place[: len(path)] == path]:
        del places[stale]
    for length in range(len(path), 0, -1):
        places.setdefault(path[:length], where)


def _key_in(target: Any, part: str, *, path: KeyPath, where: str) -> str | int:
    """``part`` as a key of a mapping, or as an index or an item's ``name`` in a list."""
    inside = ".".join(str(key) for key in path) or "the recipe"
    if isinstance(target, dict):
        return part
    if not isinstance(target, list):
        raise RecipeError(f"{where}: {inside} is {target!r} and has no {part!r}; override it whole")
    if part.isdecimal() and int(part) < len(target):
        return int(part)
    names = [str(item["name"]) for item in target if isinstance(item, dict) and "name" in item]
    if part in names:
        return names.index(part)
    known = f"0 to {len(target) - 1}" + (f" or {', '.join(names)}" if names else "")
    raise RecipeError(f"{where}: {inside} has no item {part!r}; use {known}")
