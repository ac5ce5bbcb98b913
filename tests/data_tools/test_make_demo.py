"""The demo's corpus: honest sources, no docstring left in the code, the same text every time."""

from __future__ import annotations

import ast
import re

import pytest

from data_tools.make_demo import language_reference, without_docstrings
from data_tools.worked_arithmetic import number_in_words, worked_arithmetic

CODE = '''"""Module."""
import os  # kept
"""Not a docstring."""

class A:
    """Class
    over two lines."""
    # kept too
    x: int = 1

    def only(self):
        """Only a docstring."""

    async def more(self): "one line"; return "a string"


def nested():
    """Has é before."""
    if os:
        def inner():
            """Inner."""
            return """kept"""
    return inner
'''


def test_docstrings_go_and_all_else_stays() -> None:
    stripped = without_docstrings(CODE, ast.parse(CODE))
    assert stripped is not None
    for gone in ('"""Module', "over two lines", "Only a docstring", "one line", "Has", '"""Inner'):
        assert gone not in stripped
    for kept in ("# kept", "# kept too", '"""Not a', '"a string"', '"""kept"""', "x: int = 1"):
        assert kept in stripped
    left = [
        node.name if not isinstance(node, ast.Module) else "module"
        for node in ast.walk(ast.parse(stripped))
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and ast.get_docstring(node) is not None
    ]
    assert left == []
    assert "def only(self):\n        pass" in stripped


def test_the_arithmetic_is_seeded_and_right() -> None:
    documents = list(worked_arithmetic(3, 300))
    assert documents == list(worked_arithmetic(3, 300)) != list(worked_arithmetic(4, 300))
    text = "\n".join(documents)
    for sign, result in (("+", int.__add__), ("-", int.__sub__), ("x", int.__mul__)):
        sums = re.findall(rf"(?<!\d)(?<![\d+] )(\d+) {re.escape(sign)} (\d+) = (\d+)", text)
        assert len(sums) > 100
        assert all(result(int(left), int(right)) == int(total) for left, right, total in sums)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (40, "forty"),
        (219, "two hundred and nineteen"),
        (1204, "one thousand two hundred and four"),
        (70_000, "seventy thousand"),
        (1_000_005, "one million and five"),
    ],
)
def test_numbers_in_words(number: int, words: str) -> None:
    assert number_in_words(number) == words


def test_the_language_reference_is_there() -> None:
    topics = language_reference()
    assert len(topics) > 50
    assert all(document.source == "prose" and len(document.text) > 50 for document in topics)
