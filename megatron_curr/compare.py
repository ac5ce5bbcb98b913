"""What two recipes or two runs do differently: no model, no torch.

A recipe is compared as it is resolved, every default filled in. Of runs, also what their ledgers
make of the curriculum, the bytes that they read, and the first step whose samples or loss differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_curr.curriculum.differences import schedule_differences
from megatron_curr.curriculum.ledger import ledger_schedule, open_ledger, read_ledger
from megatron_curr.curriculum.lots import planner_of
from megatron_curr.curriculum.schedule import Schedule
from megatron_curr.data.identity import read_known
from megatron_curr.recipe.load import load_recipe, recipe_differences
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

SAMPLES = "data/samples_digest"
LOSSES = ("train/loss_nats_per_token", "train/flow_mse")


@dataclass(frozen=True)
class Value:
    """A setting that differs, by its key path; None where one has none."""

    path: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Step:
    """The first step of both at which a metric differs; None where none does."""

    metric: str
    step: int
    consumed_tokens: int
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two recipes or runs, ``a`` and ``b``."""

    a: str
    b: str
    settings: tuple[Value, ...]
    curriculum: tuple[str, ...]
    """What the schedules do differently, by token; empty of video beside text."""
    data: tuple[str, ...]
    """Tokenizer and shard folders, by their place in the recipe, that hold other bytes in runs."""
    num_steps: int | None
    """Steps that both runs have on record; None where one is no run."""
    steps: tuple[Step, ...]

    @property
    def is_same(self) -> bool:
        """Whether nothing differs but the name and the place."""
        free = {"name", "run_folder"}
        settings = {value.path for value in self.settings} - free
        return not (settings or self.curriculum or self.data or self.steps)

    def as_json(self) -> str:
        """For scripts."""
        return json.dumps({"same": self.is_same, **asdict(self)}, indent=2)

    def as_text(self) -> str:
        """For people: one difference a line."""
        return "\n".join([f"a  {self.a}", f"b  {self.b}", *self._lines()])

    def _lines(self) -> Iterator[str]:
        for value in self.settings:
            yield f"{value.path}: {_spelt(value.a)} -> {_spelt(value.b)}"
        if self.curriculum:
            yield "by token:"
            yield from (f"  {change}" for change in self.curriculum)
        for place in self.data:
            yield f"{place}: holds other bytes"
        if self.num_steps is not None:
            yield f"steps on record in both: {self.num_steps:,}"
        for step in self.steps:
            yield (
                f"{step.metric}: differs first at step {step.step}, token "
                f"{step.consumed_tokens:,}: {step.a} -> {step.b}"
            )
        if self.num_steps and not self.steps:
            yield "the same samples and losses in all of them"
        if self.is_same:
            yield "no difference in what is trained"


def compare(a: Path, b: Path) -> Comparison:
    """Two recipes, two runs or one of each. Raises ``UserError`` for what is neither."""
    recipes = [load_recipe(path) for path in (a, b)]
    schedules = [_schedule(path, recipe) for path, recipe in zip((a, b), recipes, strict=True)]
    settings = tuple(
        Value(found.path, found.old, found.new) for found in recipe_differences(*recipes)
    )
    changes: list[str] = []
    if isinstance(recipes[0], VideoRecipe) == isinstance(recipes[1], VideoRecipe):
        changes = [
            f"{change.from_tokens:,} to {change.to_tokens:,}  {change}"
            for change in schedule_differences(schedules[0], schedules[1])
        ]
    num_steps, steps = _compare_rows(a, b)
    return Comparison(
        a=str(a),
        b=str(b),
        settings=settings,
        curriculum=tuple(changes),
        data=tuple(_other_data(a, b)),
        num_steps=num_steps,
        steps=steps,
    )


def _schedule(path: Path, recipe: Recipe | VideoRecipe) -> Schedule:
    ledger = path / "ledger.jsonl"
    entries = read_ledger(ledger) if ledger.is_file() else open_ledger(recipe.curriculum)
    return ledger_schedule(entries, planner_of(recipe))


def _other_data(a: Path, b: Path) -> Iterator[str]:
    """Places that both runs name and that held different bytes when they began."""
    ours, theirs = (read_known(path) if path.is_dir() else None for path in (a, b))
    if ours is None or theirs is None:
        return
    if ours.tokenizer != theirs.tokenizer:
        yield "data.tokenizer"
    for place, digests in ours.digests.items():
        if place in theirs.digests and theirs.digests[place] != digests:
            yield place


def _compare_rows(a: Path, b: Path) -> tuple[int | None, tuple[Step, ...]]:
    """How many steps both have, and where each metric differs first."""
    files = [path / "metrics.jsonl" for path in (a, b)]
    if not all(file.is_file() for file in files):
        return None, ()
    known = {row["step"]: row for row in _step_rows(files[0])}
    first: dict[str, Step] = {}
    both: set[int] = set()
    for row in _step_rows(files[1]):
        other = known.get(row["step"])
        if other is None:
            continue
        both.add(row["step"])
        for name in (SAMPLES, "consumed_tokens", *LOSSES):
            values = other.get(name), row.get(name)
            if None not in values and values[0] != values[1] and name not in first:
                first[name] = Step(name, row["step"], row["consumed_tokens"], *values)
    return len(both), tuple(sorted(first.values(), key=lambda step: step.step))


def _step_rows(file: Path) -> Iterator[dict[str, Any]]:
    """What is compared of every row of a step; a line that is torn is none."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and any(name in row for name in LOSSES):
                kept = ("step", "consumed_tokens", SAMPLES, *LOSSES)
                yield {name: row[name] for name in kept if name in row}


def _spelt(value: Any) -> str:
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
