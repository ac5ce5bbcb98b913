"""YAML to plain data, remembering the line of every value; duplicate keys are refused.

The scalar rules are YAML 1.2's: ``3e-4`` is a number, ``on`` and ``no`` are text, ``010`` is ten.
PyYAML's own are those of 1.1, where a source named ``no`` becomes ``False``.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from megatron_curr.errors import RecipeError

Path = tuple[str | int, ...]
_MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (typed so by PyYAML)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (typed so by PyYAML)

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out: anchors are for people."""
        return True


_SCALARS = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}",
            re.compile(f"^(?:{_pattern})$"),
            ["" if letter == "\0" else letter for letter in _first],
        )


_REMEDIES = {
    "found character '\\t' that cannot start any token": "found a tab; indent with spaces",
    "but found another document": "found a second document after '---'; keep one of the two",
}


def _construct_int(_loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))


def _construct_float(_loader: _Loader, node: yaml.ScalarNode) -> float:
    text = node.value.replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, file_name: str) -> tuple[Any, dict[Path, int]]:
    """The data of one document and the line (from 1) on which each path in it was written.

    Raises ``RecipeError`` as ``file:line: what; remedy`` for syntax and for duplicate keys.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _refuse_duplicates(node, file_name, inside=())
        data = loader.construct_document(node)  # flattens merged keys into the nodes as well
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        problem = _REMEDIES.get(str(error.problem), error.problem)
        raise RecipeError(f"{file_name}:{line}: not valid YAML: {problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{file_name}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    lines: dict[Path, int] = {(): node.start_mark.line + 1}
    _collect_lines(node, (), lines)
    return data, lines


def dump_yaml(data: Any) -> str:
    """Block-style YAML that ``parse_yaml`` reads back to equal data."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
    return text


def _refuse_duplicates(node: yaml.Node, file_name: str, *, inside: tuple[int, ...]) -> None:
    if id(node) in inside:
        line = node.start_mark.line + 1
        raise RecipeError(f"{file_name}:{line}: an anchor contains itself; write the value out")
    inside = (*inside, id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(child, file_name, inside=inside)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, child in node.value:
        line = key.start_mark.line + 1
        if key.tag != _MERGE and isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise RecipeError(
                    f"{file_name}:{line}: key {key.value!r} was given on line {seen[key.value]} "
                    f"already; keep one of the two"
                )
            seen[key.value] = line
        _refuse_duplicates(child, file_name, inside=inside)


def _collect_lines(node: yaml.Node, path: Path, lines: dict[Path, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, child in node.value:
            name = str(key.value)
            lines[(*path, name)] = key.start_mark.line + 1
            _collect_lines(child, (*path, name), lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            lines[(*path, index)] = child.start_mark.line + 1
            _collect_lines(child, (*path, index), lines)
