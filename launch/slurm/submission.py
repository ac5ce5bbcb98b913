"""What a submission leaves in the run folder for its jobs and for whoever looks at the run."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from megatron_curr.durable import write_durably


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One call of ``submit``. ``by`` says how the run goes on when a job has ended.

    ``max_jobs`` counts the first one, and None stands for "until it is done".
    """

    number: int
    run_folder: str
    name: str  # of its jobs; the same for every submission of a run
    by: str  # singleton, requeue or none
    max_jobs: int | None
    num_nodes: int
    spares: int
    ranks_per_node: int
    launcher: str
    rank_order: str
    partition: str
    min_slice_s: float
    max_fruitless: int
    restarts_per_job: int
    exclude_s: float
    revision: str | None  # of git; None where the package was installed without one
    is_changed: bool  # the code differs from that revision: code.diff has how
    code: str  # the frozen package
    submitted_at_s: float
    cpus_per_rank: int | None = None
    has_gpus: bool = False
    inherit: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # telling variables where submit was typed

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return Path(self.run_folder) / "slurm" / f"{self.number:04d}"

    @property
    def script(self) -> Path:
        """What sbatch is given."""
        return self.folder / "train.sbatch"

    @property
    def chain(self) -> str:
        """The incarnations that belong together."""
        return f"{self.name}/{self.number:04d}"

    @property
    def file(self) -> Path:
        """The submission itself, for its jobs."""
        return self.folder / "submission.json"

    def save(self) -> None:
        """Write it, whole."""
        write_durably(self.file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Submission:
        """Inverse of ``save``; keys of later versions are passed over."""
        values = json.loads(file.read_text(encoding="utf-8"))
        known = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def submissions(run_folder: Path) -> list[Submission]:
    """Every submission of a run, oldest first."""
    files = (run_folder / "slurm").glob("[0-9]*/submission.json")
    found = [Submission.read(file) for file in files]
    return sorted(found, key=lambda submission: submission.number)


def tell(submission: Submission, what: str, **facts: Any) -> dict[str, Any]:
    """Append one event; a line is small enough to reach a shared file whole."""
    event = {"at_s": round(time.time(), 3), "submission": submission.number, "what": what, **facts}
    file = Path(submission.run_folder) / "slurm" / "events.jsonl"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, json.dumps(event).encode() + b"\n")
    finally:
        os.close(descriptor)
    return event


def events(run_folder: Path, *, submission: int | None = None) -> list[dict[str, Any]]:
    """What was told, oldest first; a torn line is passed over."""
    try:
        lines = (run_folder / "slurm" / "events.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if submission in (None, event.get("submission")):
            found.append(event)
    return found
