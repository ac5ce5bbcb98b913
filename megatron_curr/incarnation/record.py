"""What an incarnation writes down: who it is, how far it is, how each rank and the whole ended."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from megatron_curr.durable import write_durably

Verdict = Literal["finished", "continue", "continue_elsewhere", "stop"]

CAUSES: dict[str, tuple[Verdict, str]] = {
    "complete": ("finished", "the schedule is at its end"),
    "stop-at": ("stop", "--stop-at said so"),
    "signal": ("continue", "a signal asked it to save and end: the time limit, a preemption"),
    "interrupted": ("stop", "Ctrl-C"),
    "wrong-input": ("stop", "the recipe, the data or the run folder cannot be used as they are"),
    "fenced": ("stop", "a successor has taken over; this one was stale"),
    "nonfinite": ("continue", "too many updates in a row were refused"),
    "save-failed": ("continue", "the last checkpoint did not reach the disk"),
    "preflight": ("continue_elsewhere", "a node failed its check before the first step"),
    "no-meeting": ("continue_elsewhere", "ranks did not come to the rendezvous"),
    "hang": ("continue", "a step took many times as long as those before"),
    "lost-rank": ("continue", "a rank or its node died without a word"),
    "error": ("continue", "an exception; its name follows the colon"),
    "vanished": ("continue", "all ranks died without a word"),
}

TIMES = {
    "idle": "after an end, until somebody took the run up again; no part of the wall clock",
    "queue": "from the submission, or the end of the incarnation before, to the launch",
    "launch": "from the launch of the ranks to the start of rank 0's program",
    "imports": "rank 0's program until it can train: imports, reading recipe and data",
    "meet": "waiting for the other ranks, and the checks before the first step",
    "load": "building the model, reading the checkpoint",
    "compute": "steps",
    "evaluate": "held-out loss",
    "save": "training stood still for checkpoints",
    "other": "what is left of the wall clock, the way from the last sign of life to the end too",
}


class _Json:
    """A dataclass that is a JSON object; unknown keys are passed over, so that versions mix."""

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=1) + "\n"  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of ``to_json``. Raises ``ValueError`` or ``TypeError`` on anything else."""
        values: Any = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not an object")
        known = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**{name: value for name, value in values.items() if name in known})

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """What ``path`` holds; None where it is missing or not readable."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, TypeError):
            return None


@dataclass(frozen=True, kw_only=True)
class Claim(_Json):
    """Who an incarnation is. Times are Unix times."""

    incarnation: int
    chain: str
    host: str
    pid: int
    num_ranks: int
    job_id: str | None = None
    restart: int = 0
    submitted_at_s: float | None = None
    launched_at_s: float
    started_at_s: float  # of rank 0's program
    claimed_at_s: float


@dataclass(frozen=True, kw_only=True)
class Beat(_Json):
    """How far an incarnation is."""

    at_s: float
    step: int
    consumed_tokens: int
    resumed_step: int
    resumed_tokens: int
    saved_step: int
    saved_tokens: int
    lost_tokens: int = 0
    lost_s: float = 0.0
    times_s: Mapping[str, float] = field(default_factory=dict)
    step_time_s: float | None = None
    save_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ending(_Json):
    """One rank's word about its end. ``is_echo``: it ended because another rank did."""

    rank: int
    node: str
    at_s: float
    cause: str
    detail: str
    is_echo: bool = False
    stage: str = ""  # what it was doing
    step: int | None = None
    bad_nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record(_Json):
    """How an incarnation ended; see the package's first page for every field."""

    incarnation: int
    verdict: Verdict
    cause: str
    detail: str
    step: int
    consumed_tokens: int
    resumed_step: int
    resumed_tokens: int
    saved_step: int
    saved_tokens: int
    lost_tokens: int
    lost_s: float
    bad_nodes: tuple[str, ...]
    suspect_ranks: tuple[int, ...]
    times_s: Mapping[str, float]
    step_time_s: float | None
    save_s: float | None
    began_at_s: float
    ended_at_s: float
    chain: str
    job_id: str | None
    restart: int
    num_ranks: int
    nodes: tuple[str, ...]

    @property
    def may_continue(self) -> bool:
        """Whether a successor makes sense."""
        return self.verdict in ("continue", "continue_elsewhere")


@dataclass(frozen=True, kw_only=True)
class RolledBack(_Json):
    """What a rollback after this incarnation took back."""

    to_tokens: int
    lost_tokens: int
    lost_s: float  # of the steps

    def after(self, earlier: RolledBack | None) -> RolledBack:
        """This one, and what one before it took back already."""
        if earlier is None:
            return self
        return RolledBack(
            to_tokens=self.to_tokens,
            lost_tokens=self.lost_tokens + earlier.lost_tokens,
            lost_s=self.lost_s + earlier.lost_s,
        )


@dataclass(frozen=True)
class Incarnation:
    """The folder of one incarnation, and what can be read there."""

    folder: Path

    @property
    def number(self) -> int:
        """Counted from 1 in a run."""
        return int(self.folder.name)

    @property
    def pen(self) -> Path:
        """Stands while this incarnation may write."""
        return self.folder / "pen"

    @property
    def far_pen(self) -> Path:
        """Its pen for checkpoints, where these lie on a disk of their own."""
        return self.folder.parents[1] / "checkpoints" / ".pens" / self.folder.name

    @property
    def checkpoint_pen(self) -> Path:
        """Through which it saves: on the disk of the checkpoints."""
        return self.far_pen if self.far_pen.exists() else self.pen

    @property
    def claim(self) -> Claim | None:
        """Who it is; None in the instant before that is written."""
        return Claim.read(self.folder / "claim.json")

    @property
    def beat(self) -> Beat | None:
        """Its last sign of life; None before the first step."""
        return Beat.read(self.folder / "beat.json")

    @property
    def record(self) -> Record | None:
        """How it ended; None while it lives, or where nobody has concluded yet."""
        return Record.read(self.folder / "record.json")

    @property
    def rolled_back(self) -> RolledBack | None:
        """What was taken back after it ended; None where nothing was."""
        return RolledBack.read(self.folder / "rolled-back.json")

    @property
    def endings(self) -> list[Ending]:
        """What ranks said about their end, the earliest first."""
        found = (Ending.read(path) for path in self.folder.glob("ended.*.json"))
        return sorted((ending for ending in found if ending), key=lambda ending: ending.at_s)

    def leave_word(self, ending: Ending) -> None:
        """Write down how a rank ended; its last word stands. Raises ``OSError``."""
        write_durably(self.folder / f"ended.{ending.rank}.json", ending.to_json())

    @property
    def ranks_by_node(self) -> dict[str, list[int]]:
        """Which ranks ran where; empty when they never met."""
        try:
            found = json.loads((self.folder / "nodes.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def incarnations(run_folder: Path) -> list[Incarnation]:
    """Every incarnation of a run, oldest first."""
    folder = run_folder / "incarnations"
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return [Incarnation(path) for path in sorted(found, key=lambda path: int(path.name))]


def of_job(run_folder: Path, job_id: str, restart: int = 0) -> Incarnation | None:
    """The newest incarnation that this start of a Slurm job made; None when it got to none."""
    for incarnation in reversed(incarnations(run_folder)):
        claim = incarnation.claim
        if claim is not None and (claim.job_id, claim.restart) == (job_id, restart):
            return incarnation
    return None
