"""``--filter`` expressions over a document's fields: Python's own syntax, and a small part of it.

    quality > 0.5 and domain(url) in ("example.org", "example.com") and date >= "2020-01-01"

Comparisons, ``and``/``or``/``not``, ``in``, arithmetic, ``x if c else y``, literals, fields by name
(those that are no identifiers as ``field("a-b")``) and the functions of ``FUNCTIONS``.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any
from urllib.parse import urlsplit

from megatron_curr.errors import DataError


def domain(url: str) -> str:
    """``example.org`` of ``https://www.example.org:80/page``."""
    parts = urlsplit(url if "//" in url else f"//{url}")
    return (parts.hostname or "").removeprefix("www.")


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "domain": domain,
    "len": len,
    "lower": str.lower,
    "startswith": str.startswith,
    "endswith": str.endswith,
    "int": int,
    "float": float,
}
_FIELD = "field"
_ALLOWED = (
    *(ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq),
    *(ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Is, ast.IsNot, ast.IfExp, ast.Call),
    *(ast.Name, ast.Load, ast.Constant, ast.Tuple, ast.List, ast.Set),
)


class Filter:
    """A compiled expression. ``fields`` are the names it reads."""

    def __init__(self, expression: str) -> None:
        self.expression = expression
        try:
            tree = ast.parse(expression, "--filter", "eval")
        except (SyntaxError, ValueError) as error:
            raise DataError(f"--filter {expression!r}: {error}; write it as Python does") from error
        self._check(tree)
        calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        self.fields = tuple(
            sorted(
                {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and id(n) not in calls}
                | {_named_field(n) for n in ast.walk(tree) if isinstance(n, ast.Call)} - {""}
            )
        )
        self._code: CodeType = compile(tree, "--filter", "eval")

    def _check(self, tree: ast.Expression) -> None:
        for node in ast.walk(tree):
            if not isinstance(node, _ALLOWED):
                raise DataError(
                    f"--filter {self.expression!r}: {type(node).__name__} is not allowed; use "
                    "comparisons, and, or, not, in, arithmetic, fields and "
                    f"{', '.join([_FIELD, *FUNCTIONS])}"
                )
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else ""
                if node.keywords or not (name in FUNCTIONS or _named_field(node)):
                    raise DataError(
                        f"--filter {self.expression!r}: {ast.unparse(node)} is no known function; "
                        f"known are {_FIELD}, {', '.join(FUNCTIONS)}"
                    )

    def __call__(self, content: Mapping[str, Any]) -> bool | str:
        """Whether a document stays; or the reason why that cannot be told."""
        try:
            names = {name: content[name] for name in self.fields}
        except KeyError as missing:
            return f"no field {missing} to filter by"
        scope = {"__builtins__": {}, **FUNCTIONS, _FIELD: names.__getitem__, **names}
        try:
            return bool(eval(self._code, scope))
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            return f"cannot be filtered ({type(error).__name__})"


def _named_field(node: ast.Call) -> str:
    """``a-b`` of ``field("a-b")``; empty for every other call."""
    if isinstance(node.func, ast.Name) and node.func.id == _FIELD and len(node.args) == 1:
        argument = node.args[0]
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
            return argument.value
    return ""
