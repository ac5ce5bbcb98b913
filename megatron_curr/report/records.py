"""What a run left on disk, read into columns: recipe, schedule and metrics.

Legend: a *row* is one line of ``metrics.jsonl``; a step row carries the training loss,
an evaluation row ``eval/time_s``, a checkpoint row ``checkpoint/blocked_s``, and every start of
the run wrote one row with ``run/num_ranks``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_curr.curriculum.ledger import Entry, ledger_schedule, open_ledger, read_ledger
from megatron_curr.curriculum.lots import planner_of
from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

Floats = NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of one kind, in the order of the token clock."""

    rows: tuple[Row, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> Floats:
        """One value a row; NaN where the row has none."""
        return np.array([_number(row.get(name)) for row in self.rows], dtype=np.float64)

    def names(self) -> set[str]:
        """Every key that any row has."""
        return {name for row in self.rows for name in row}

    def where(self, keep: Sequence[bool] | NDArray[np.bool_]) -> Table:
        """The rows whose flag is true."""
        return Table(tuple(row for row, kept in zip(self.rows, keep, strict=True) if kept))


@dataclass(frozen=True)
class PhaseSpan:
    """A phase as the run goes through it, on the token clock."""

    name: str
    start_tokens: int
    end_tokens: int


@dataclass(frozen=True)
class RunRecords:
    """One run, finished or not."""

    folder: Path
    recipe: Recipe | VideoRecipe
    recipe_text: str
    ledger: tuple[Entry, ...]
    schedule: Schedule
    steps: Table
    evaluations: Table
    checkpoints: Table
    starts: Table
    num_unreadable_lines: int

    @property
    def loss(self) -> str:
        """The last part of the names of its losses."""
        return loss_of(self.recipe)

    @property
    def loss_unit(self) -> str:
        """Of the losses."""
        return "squared error" if self.buckets else "nats per token"

    @property
    def buckets(self) -> tuple[str, ...]:
        """Shapes of a video run; none for text."""
        return tuple(self.recipe.data.buckets) if isinstance(self.recipe, VideoRecipe) else ()

    @property
    def sources(self) -> tuple[str, ...]:
        """Source names in the order of the recipe."""
        return tuple(self.recipe.data.sources)

    @property
    def phases(self) -> tuple[PhaseSpan, ...]:
        """The phases in order; one that an amendment cut and took up again counts once."""
        spans: list[PhaseSpan] = []
        for stretch in self.schedule.stretches:
            start = stretch.start_tokens
            if spans and spans[-1].name == stretch.phase:
                start = spans.pop().start_tokens
            spans.append(PhaseSpan(stretch.phase, start, stretch.end_tokens))
        return tuple(spans)

    def plan_at(self, tokens: float) -> StepPlan:
        """The plan of the step that consumes this token."""
        last = self.schedule.total_tokens - 1
        return self.schedule.at(self.schedule.step_start(min(int(tokens), last)))

    @property
    def consumed_tokens(self) -> int:
        """The clock after the last step on record."""
        return int(self.steps.rows[-1]["consumed_tokens"]) if len(self.steps) else 0

    @property
    def is_finished(self) -> bool:
        """Whether the last planned token was consumed."""
        return self.consumed_tokens >= self.schedule.total_tokens


def loss_of(recipe: Recipe | VideoRecipe) -> str:
    """What the metrics call the loss of this kind of run."""
    return "flow_mse" if isinstance(recipe, VideoRecipe) else "loss_nats_per_token"


def read_run(folder: Path) -> RunRecords:
    """The run in ``folder``. Raises ``CheckpointError`` when it is not a run folder."""
    recipe_path = folder / "recipe.yaml"
    if not recipe_path.is_file():
        raise CheckpointError(
            f"{folder}: no recipe.yaml, so this is not a run folder; "
            "give the folder that `megatron-curr train` wrote, such as runs/demo_text"
        )
    recipe = load_recipe(recipe_path)
    rows, num_unreadable = _read_rows(folder / "metrics.jsonl")
    path = folder / "ledger.jsonl"
    ledger = read_ledger(path) if path.is_file() else open_ledger(recipe.curriculum)
    return RunRecords(
        folder=folder,
        recipe=recipe,
        recipe_text=recipe_path.read_text(encoding="utf-8"),
        ledger=ledger,
        schedule=ledger_schedule(ledger, planner_of(recipe)),
        steps=_rows_with(rows, f"train/{loss_of(recipe)}"),
        evaluations=_rows_with(rows, "eval/time_s"),
        checkpoints=_rows_with(rows, "checkpoint/blocked_s"),
        starts=_rows_with(rows, "run/num_ranks"),
        num_unreadable_lines=num_unreadable,
    )


def _rows_with(rows: Sequence[Row], name: str) -> Table:
    kept = [row for row in rows if name in row]
    return Table(tuple(sorted(kept, key=lambda row: int(row["consumed_tokens"]))))


def _read_rows(path: Path) -> tuple[list[Row], int]:
    """Rows, and how many lines were not JSON: a run that is being written ends on a torn one."""
    if not path.is_file():
        return [], 0
    rows: list[Row] = []
    num_unreadable = 0
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                num_unreadable += 1
                continue
            if isinstance(row, dict) and isinstance(row.get("consumed_tokens"), int):
                rows.append(row)
            else:
                num_unreadable += 1
    return rows, num_unreadable


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
