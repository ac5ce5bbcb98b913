"""What is wrong with a recipe, as lines a person can act on: place, what was found, remedy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.section import NAME_PATTERN, Section
from megatron_curr.recipe.yaml_lines import Path


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one path of the recipe."""

    path: Path
    message: str

    @property
    def where(self) -> str:
        """The path as ``--set`` spells it."""
        return ".".join(str(part) for part in self.path) or "recipe"


def did_you_mean(name: str, known: Iterable[str], *, what: str) -> str:
    """``did you mean 'x'?``, or the list of what is known where nothing comes near."""
    names = list(known)
    close = get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known {what}: {', '.join(names)}"


def refusal(problems: Iterable[Problem], places: Mapping[Path, str] | None = None) -> RecipeError:
    """One error that lists every problem; ``places`` says where each path was written."""
    found = dict.fromkeys(problems)
    lines = [
        f"{_place(problem.path, places)}{problem.where}: {problem.message}" for problem in found
    ]
    return RecipeError("\n".join(lines))


def _place(path: Path, places: Mapping[Path, str] | None) -> str:
    """The place of the longest part of the path that was written at all."""
    for length in range(len(path), -1, -1):
        if places and path[:length] in places:
            return f"{places[path[:length]]}: "
    return ""


def problems_of(error: ValidationError, kind: type[Section] = Recipe) -> list[Problem]:
    """A schema error of ``kind`` as problems, one for each thing that is wrong."""
    return [_problem_of(details, kind) for details in error.errors(include_url=False)]


def _problem_of(details: ErrorDetails, section: type[Section]) -> Problem:
    # Tags such as <piece> say which way of writing a curve was meant; they are no part of the path.
    path = tuple(part for part in details["loc"] if not str(part).startswith("<"))
    path = tuple("from" if part == "from_" else part for part in path)
    kind, found = details["type"], details["input"]
    if path and path[-1] == "[key]":  # pydantic's mark for a bad key of a mapping
        message = f"{found!r} is no name; use letters, digits, '_', '.' and '-' only"
        return Problem(path[:-1], message)
    if kind == "unknown_preset":
        return Problem((*path, "preset"), details["msg"])
    if kind == "extra_forbidden":
        known = known_keys(path[:-1], section)
        return Problem(path, f"unknown key; {did_you_mean(str(path[-1]), known, what='keys')}")
    if kind == "missing":
        return Problem(path, f"missing; {_what_is_expected(path, section)}")
    if kind == "value_error":
        return Problem(path, str(details["ctx"]["error"]))
    if kind == "string_pattern_mismatch" and details["ctx"]["pattern"] != NAME_PATTERN:
        return Problem(path, f"found {_shown(found)}; {_what_is_expected(path, section)}")
    return Problem(path, f"found {_shown(found)}; {_requirement(details)}")


def _requirement(details: ErrorDetails) -> str:
    """What pydantic asks for, in a sentence that starts with ``must`` wherever it can."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "literal_error":
        return f"must be {context['expected']}"
    if kind == "string_pattern_mismatch":
        return "use letters, digits, '_', '.' and '-' only"
    if kind in _REQUIREMENTS:
        return _REQUIREMENTS[kind].format(**context)
    return details["msg"][0].lower() + details["msg"][1:]


_REQUIREMENTS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be {ge} or more",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be {le} or less",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text (put it in quotes)",
    "path_type": "must be the path of a folder",
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "list_type": "must be a list",
    "too_short": "must have at least {min_length} of them",
}


def _shown(found: object) -> str:
    text = repr(found)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _what_is_expected(path: Path, kind: type[Section]) -> str:
    """The field's own description, so that a missing key is explained on the spot."""
    for section in _sections_at(path[:-1], kind):
        field = section.model_fields.get(str(path[-1]))
        if field is not None and field.description:
            return f"give it: {field.description}"
    return "give it"


def known_keys(path: Path, kind: type[Section] = Recipe) -> list[str]:
    """The keys that the section at this path of ``kind`` accepts, as they are written in YAML."""
    return [
        field.alias or name
        for section in _sections_at(path, kind)
        for name, field in section.model_fields.items()
    ]


def _sections_at(path: Path, root: type[Section]) -> list[type[Section]]:
    """The section types a path may lead to; several where a curve can be written several ways."""
    types: list[Any] = [root]
    for part in path:
        types = [child for kind in types for child in _children(kind, part)]
    return [kind for kind in types if isinstance(kind, type) and issubclass(kind, Section)]


def _children(kind: Any, part: str | int) -> list[Any]:
    if isinstance(kind, type) and issubclass(kind, Section):
        name = "from_" if part == "from" else str(part)
        field = kind.model_fields.get(name)
        return _alternatives(field.annotation) if field else []
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list and isinstance(part, int):
        return _alternatives(arguments[0])
    if origin is dict:
        return _alternatives(arguments[1])
    return []


def _alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without ``Annotated`` around them and without ``None``."""
    if get_origin(annotation) is Annotated:
        return _alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in _alternatives(member)]
    return [] if annotation is NoneType else [annotation]
