"""The repository tests its own shape: who imports whom, how long things are, what is documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from megatron_curr.cli import app
from megatron_curr.reference import PAGES

ROOT = Path(__file__).parents[1]
SOURCES = [
    file
    for top in ("megatron_curr", "launch", "data_tools", "benchmarks", "tests")
    for file in sorted((ROOT / top).rglob("*.py"))
]
SHIPPED = [file for file in SOURCES if file.relative_to(ROOT).parts[0] not in {"tests"}]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# What each part may import besides itself. "." stands for the modules at the top of megatron_curr.
FLOOR = {"errors", "units", "durable", "__init__"}
CORE = FLOOR | {"recipe"}
BELOW: dict[str, set[str]] = {
    "errors": set(),
    "units": set(),
    "durable": set(),
    "__init__": set(),
    "incarnation": FLOOR,
    "recipe": FLOOR,
    "curriculum": CORE,
    "plan": CORE | {"curriculum"},
    "report": CORE | {"curriculum", "plan", "incarnation"},
    "data": CORE | {"curriculum"},
    "parallel": CORE,
    "models": CORE | {"parallel"},
    "training": CORE | {"curriculum", "plan", "incarnation", "data", "parallel", "models"},
    "video_trace": CORE | {"curriculum", "data"},
    "compare": CORE | {"curriculum", "data"},
    "reference": CORE | {"training"},
    "trace": CORE | {"curriculum", "data", "video_trace"},
    "trace_verify": CORE | {"data", "trace", "video_trace"},
    "doctor": CORE | {"incarnation", "models"},
    "convert": CORE | {"curriculum", "plan", "report", "data", "parallel", "models", "training"},
    "sample": CORE | {"curriculum", "data", "parallel", "models", "training", "convert"},
}
EVERYTHING = {"cli", "__main__"}  # the command line imports whatever it starts
MEGATRON_CORE_IN = {"parallel", "models", "training", "convert"}
MEGATRON_CORE_READER = "megatron_curr/data/"
WITHOUT_TORCH = ["recipe", "curriculum", "plan", "report", "incarnation"]
UNTELLING = {"utils", "util", "helpers", "helper", "common", "misc"}


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def part_of(file: Path) -> str:
    """``recipe`` for megatron_curr/recipe/load.py, ``cli`` for megatron_curr/cli/train.py."""
    parts = file.relative_to(ROOT / "megatron_curr").parts
    return parts[0].removesuffix(".py")


def imports_of(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, at any depth."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module
            if node.module in {"megatron_curr", "megatron"}:
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def package_parts() -> Iterator[tuple[Path, str]]:
    for file in sorted((ROOT / "megatron_curr").rglob("*.py")):
        if (part := part_of(file)) not in EVERYTHING:
            yield file, part


def test_imports_go_one_way() -> None:
    wrong = [
        f"{name_of(file)}:{line} imports {name}"
        for file, part in package_parts()
        for line, name in imports_of(file)
        if name.startswith("megatron_curr.")
        and name.split(".")[1] not in {part, "__version__", *BELOW[part]}
    ]
    assert wrong == []


def test_package_imports_no_launcher_tool_or_test() -> None:
    wrong = [
        f"{name_of(file)}:{line} imports {name}"
        for file, _ in package_parts()
        for line, name in imports_of(file)
        if name.split(".")[0] in {"launch", "data_tools", "benchmarks", "tests"}
    ]
    assert wrong == []


def test_megatron_core_is_imported_only_where_it_belongs() -> None:
    wrong = [
        f"{name_of(file)}:{line} imports {name}"
        for file, part in package_parts()
        for line, name in imports_of(file)
        if name.startswith("megatron.")
        and part not in MEGATRON_CORE_IN
        and not name_of(file).startswith(MEGATRON_CORE_READER)
    ]
    assert wrong == []


def test_relative_imports_are_not_used() -> None:
    wrong = [
        f"{name_of(file)}:{node.lineno}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert wrong == []


@pytest.mark.parametrize("part", WITHOUT_TORCH)
def test_part_loads_on_a_login_node_without_torch(part: str) -> None:
    modules = [
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for file in sorted((ROOT / "megatron_curr" / part).rglob("*.py"))
    ]
    program = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        "loaded = {'torch', 'megatron', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_short_enough_to_read() -> None:
    lengths = {name_of(file): len(file.read_text().splitlines()) for file in SOURCES}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FILE_LINES} == {}


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{name_of(file)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_no_module_is_named_for_nothing_in_particular() -> None:
    assert [name_of(file) for file in SOURCES if UNTELLING & set(file.stem.split("_"))] == []


def test_every_package_folder_is_a_package() -> None:
    folders = {file.parent for file in SHIPPED if name_of(file).split("/")[0] != "benchmarks"}
    assert [name_of(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_shipped_code_leaves_no_work_for_later() -> None:
    mark = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|raise NotImplementedError")
    wrong = [
        f"{name_of(file)}:{number} {line.strip()}"
        for file in SHIPPED
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if mark.search(line)
    ]
    assert wrong == []


def test_every_third_party_import_is_declared_in_setup() -> None:
    declared = (ROOT / "setup.py").read_text().lower().replace("_", "-")
    distributions = {
        "yaml": "pyyaml",
        "megatron": "megatron-core",
        "markupsafe": "jinja2",  # parts of what is declared, under names of their own
        "pydantic_core": "pydantic",
        "PIL": "pillow",
        "nvidia": "nvidia-dali-cuda120",
    }
    ours = {"megatron_curr", "launch", "data_tools", "benchmarks"}
    optional = {"transformer_engine", "apex", "amp_C"}  # found at run time, declared or documented
    named = {name.split(".")[0] for file in SHIPPED for _, name in imports_of(file)}
    foreign = named - ours - optional - set(sys.stdlib_module_names)
    undeclared = [
        name
        for name in sorted(foreign)
        if f'"{distributions.get(name, name).replace("_", "-")}' not in declared
    ]
    assert undeclared == []


def test_every_constraint_is_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = r"#.*|[A-Za-z0-9_.-]+==[0-9][0-9.]*(b[0-9]+)?"
    wrong = [line for line in lines if not re.fullmatch(exact, line)]
    assert wrong == []


def test_pre_commit_runs_the_versions_of_the_constraints() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    constraints = (ROOT / "constraints.txt").read_text()
    for tool, repo in {
        "ruff": "ruff-pre-commit",
        "codespell": "codespell-project/codespell",
    }.items():
        pinned = re.search(rf"^{tool}==(.+)$", constraints, re.MULTILINE)
        used = re.search(rf"{repo}\n    rev: v(.+)$", hooks, re.MULTILINE)
        assert pinned and used and pinned[1] == used[1], tool


def test_every_verb_has_help_with_an_example() -> None:
    command = typer.main.get_command(app)
    verbs = command.commands  # type: ignore[attr-defined]
    assert {"train", "convert", "report", "demo", "trace", "doctor", "schema"} <= set(verbs)
    for name, verb in verbs.items():
        assert verb.help, name
        assert f"Example: megatron-curr {name}" in (verb.epilog or ""), name
        undocumented = [p.name for p in verb.params if not getattr(p, "help", None)]
        assert undocumented == [], name


@pytest.mark.parametrize("page", PAGES)
def test_reference_page_is_as_the_code_makes_it(page: str) -> None:
    written = (ROOT / "docs" / f"{page}.md").read_text()
    assert written == PAGES[page](), f"docs/{page}.md is of another state: make reference"


def test_every_recipe_opens_with_its_command() -> None:
    for file in (ROOT / "configs").glob("*.yaml"):
        head = file.read_text().split("\n\n")[0]
        assert head.startswith("#") and "megatron-curr" in head, name_of(file)
