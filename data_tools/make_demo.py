"""A corpus from what every Python installation carries, with no download.

* *prose*: the language reference in ``pydoc_data.topics`` and the standard library's docstrings
* *code*: standard-library sources with the docstrings taken out (comments stay)
* *math*: worked arithmetic, see ``worked_arithmetic.py``; it is synthetic and seeded

One jsonl file a source, one document a line: ``text``, ``source`` and ``path``. The same Python
release gives the same bytes.

    python -m data_tools.make_demo --folder data/demo
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_tools.preprocess_text import Options, preprocess
from data_tools.train_tokenizer import train_tokenizer
from data_tools.worked_arithmetic import worked_arithmetic

MATH_SEED = 20_240_229
MATH_DOCUMENTS = 5_000
MAX_CODE_BYTES = 8_000_000
MIN_DOCUMENT_CHARS = 120
# Tables and fixtures rather than text; and the demo must not depend on what else is installed.
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"),
    *("test", "tests", "idle_test"),
}
Docable = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    source: str
    path: str


HELDOUT_FRAC = 0.04
SOURCES = ("prose", "code", "math")


def build_demo_data(folder: Path, *, show_progress: bool = True) -> dict[str, Path]:
    """Corpus, tokenizer and shards of the demo; returns the shard folder of each source.

    ``folder`` gets ``corpus/<source>.jsonl``, ``tokenizer.model`` and
    ``shards/<source>/{train,heldout}``. What is already there is made again, to the same bytes.
    """
    corpus = write_corpus(folder / "corpus")
    train_tokenizer([corpus[source] for source in SOURCES], folder / "tokenizer.model")
    for source in SOURCES:
        preprocess(
            [corpus[source]],
            folder / "shards" / source,
            tokenizer=folder / "tokenizer.model",
            options=Options(heldout_frac=HELDOUT_FRAC),
            overwrite=True,
            show_progress=show_progress,
        )
    return {source: folder / "shards" / source for source in SOURCES}


def write_corpus(folder: Path) -> dict[str, Path]:
    """Write ``prose.jsonl``, ``code.jsonl`` and ``math.jsonl``; the file of each source."""
    folder.mkdir(parents=True, exist_ok=True)
    prose, code = standard_library()
    sources = {
        "prose": language_reference() + prose,
        "code": _first_bytes(code, MAX_CODE_BYTES),
        "math": [
            Document(text, "math", f"synthetic/arithmetic/{number:05d}")
            for number, text in enumerate(worked_arithmetic(MATH_SEED, MATH_DOCUMENTS))
        ],
    }
    paths = {}
    for source, documents in sources.items():
        paths[source] = folder / f"{source}.jsonl"
        partial = folder / f"{source}.jsonl.partial"
        with open(partial, "w", encoding="utf-8") as stream:
            for document in documents:
                line = {"text": document.text, "source": document.source, "path": document.path}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(partial, paths[source])
    return paths


def language_reference() -> list[Document]:
    """The topics of ``help()``: the language reference as text."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a stripped-down Python; the docstrings still make a source
        return []
    return [
        Document(inspect.cleandoc(text), "prose", f"pydoc_data/topics/{topic}")
        for topic, text in sorted(topics.items())
    ]


def standard_library() -> tuple[list[Document], list[Document]]:
    """(prose, code): the docstrings, and the sources without them, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    prose, code = [], []
    for path in _python_files(root):
        place = path.relative_to(root).as_posix()
        try:
            with tokenize.open(path) as stream:  # honours a coding comment
                text = stream.read()
            tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        prose += [
            Document(doc, "prose", f"{place}#{name}") for name, doc in _docstrings(tree, place)
        ]
        stripped = without_docstrings(text, tree)
        if stripped is not None and len(stripped) >= MIN_DOCUMENT_CHARS:
            code.append(Document(stripped, "code", place))
    return prose, code


def _python_files(root: Path) -> Iterator[Path]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(set(below) - SKIPPED_FOLDERS)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py"))


def _definitions(node: ast.AST) -> Iterator[Docable]:
    """Everything inside a node that may carry a docstring; statements only, so ten times faster
    than ``ast.walk``."""
    for block in ("body", "orelse", "finalbody", "handlers", "cases"):
        for child in getattr(node, block, ()):
            if isinstance(child, Docable):
                yield child
            yield from _definitions(child)


def _docstrings(tree: ast.Module, place: str) -> Iterator[tuple[str, str]]:
    """(name, text) of a module and of each top-level class, with what stands inside them."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    module = place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    parts = [ast.get_docstring(tree) or ""]
    parts += [_described(node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    pages = [(module, parts)]
    for node in classes:
        inside = map(_described, _definitions(node))
        pages.append((f"{module}.{node.name}", [_described(node), *inside]))
    for name, described in pages:
        text = "\n\n".join(filter(None, described))
        if len(text) >= MIN_DOCUMENT_CHARS:
            yield name, f"{name}\n\n{text}\n"


def _described(node: ast.AST) -> str:
    """``name(arguments)`` and the docstring; empty when there is none."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return ""
    doc = ast.get_docstring(node)
    if not doc:
        return ""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}\n\n{doc}"
    return f"{node.name}({', '.join(argument.arg for argument in node.args.args)})\n\n{doc}"


def without_docstrings(text: str, tree: ast.Module) -> str | None:
    """The source with each docstring deleted; ``None`` when what is left does not parse.

    A body that was only a docstring becomes ``pass``. Line numbers and columns are the tree's, so
    the edit goes from the last docstring to the first.
    """
    lines = text.splitlines(keepends=True)
    found = [
        (node.body[0], len(node.body) == 1 and not isinstance(node, ast.Module))
        for node in (tree, *_definitions(tree))
        if ast.get_docstring(node, clean=False) is not None
    ]
    for statement, alone in sorted(found, key=lambda item: -item[0].lineno):
        first, last = statement.lineno - 1, (statement.end_lineno or statement.lineno) - 1
        before = lines[first].encode()[: statement.col_offset].decode()
        after = lines[last].encode()[statement.end_col_offset :].decode()
        clean = not before.strip() and not after.strip()
        if clean and not alone:
            lines[first : last + 1] = []
        else:
            lines[first : last + 1] = [f"{before}pass{after}"]
    stripped = "".join(lines)
    try:
        ast.parse(stripped)
    except (SyntaxError, ValueError):
        return None
    return stripped.strip("\n") + "\n"


def _first_bytes(documents: list[Document], max_bytes: int) -> list[Document]:
    """Documents drawn in the order of their hash until the size is reached, in their own order."""
    chosen, total = set(), 0
    for document in sorted(documents, key=lambda known: _hash(known.path)):
        if total < max_bytes:
            chosen.add(document.path)
            total += len(document.text.encode())
    return [document for document in documents if document.path in chosen]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


if __name__ == "__main__":
    import typer

    def _main(folder: Path = Path("data/demo")) -> None:
        """Write the demo's corpus, tokenizer and shards into a folder."""
        for source, shards in build_demo_data(folder).items():
            typer.echo(f"{source}: {shards}")

    typer.run(_main)
