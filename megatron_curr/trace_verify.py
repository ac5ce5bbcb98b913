"""Did a run read what its ledger says? Digests of every step's samples, computed again.

A step's row in ``metrics.jsonl`` has a digest of the samples that the loaders of all data-parallel
ranks handed to the model. Here the same is computed from the ledger and the sizes of the shards:
no layout, no loader and no checkpoint enters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_curr.data.keyed import digest_of
from megatron_curr.errors import CheckpointError
from megatron_curr.trace import Trace, open_trace
from megatron_curr.video_trace import VideoTrace

DIGEST = "data/samples_digest"


@dataclass(frozen=True, slots=True)
class Disagreement:
    """The first step whose row and ledger do not name the same samples."""

    step: int  # as in the row: steps taken when it was over
    from_tokens: int
    to_tokens: int
    in_row: str
    by_ledger: str  # a digest, or why there is none


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far rows and ledger agree."""

    num_steps: int  # that agree, up to the first that does not
    from_tokens: int
    to_tokens: int
    missing_tokens: tuple[tuple[int, int], ...]  # ranges between the rows that no row is about
    num_without: int  # step rows that carry no digest
    differs: Disagreement | None

    @property
    def agrees(self) -> bool:
        """Whether something was compared, and all of it agrees."""
        return self.num_steps > 0 and self.differs is None

    def as_json(self) -> str:
        """For a script."""
        return json.dumps({"agrees": self.agrees, **asdict(self)})

    def as_text(self) -> str:
        """For a person."""
        lines = []
        span = f"tokens {self.from_tokens:,} to {self.to_tokens:,}"
        if self.num_steps:
            lines.append(f"{self.num_steps:,} steps agree, {span}: they read what the ledger says")
        if found := self.differs:
            lines.append(
                f"step {found.step:,} differs, tokens {found.from_tokens:,} to "
                f"{found.to_tokens:,}: metrics.jsonl has {found.in_row}, by the ledger it is "
                f"{found.by_ledger}: what this step read is not what trace says of it"
            )
        lines += [
            f"no row for tokens {begin:,} to {end:,}: what was read there is not known"
            for begin, end in self.missing_tokens
        ]
        if self.num_without:
            lines.append(f"{self.num_without:,} steps have no digest: an older release wrote them")
        return "\n".join(lines) or "nothing to compare: metrics.jsonl has no row of a step"


def verify_run(run: Path, overrides: Sequence[str] = ()) -> Verdict:
    """Compare every step's digest with the ledger's, in the order of the clock.

    Raises ``UserError`` where ``run`` is not the folder of a run or its data has changed.
    """
    metrics = run / "metrics.jsonl"
    if not metrics.is_file():
        raise CheckpointError(
            f"{run}: no metrics.jsonl, so nothing to verify; give the folder of a run that has "
            "taken a step, such as runs/demo_text"
        )
    trace = open_trace(run, overrides)
    with metrics.open(encoding="utf-8", errors="replace") as lines:
        return _compare(trace, sorted(_step_rows(lines), key=lambda row: row["consumed_tokens"]))


def _step_rows(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The rows of steps; a line torn while it was written is none."""
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "train/global_batch_tokens" in row:
            yield row


def _compare(trace: Trace | VideoTrace, rows: Sequence[dict[str, Any]]) -> Verdict:
    num_steps = num_without = 0
    missing: list[tuple[int, int]] = []
    first: int | None = None
    clock = 0
    differs: Disagreement | None = None
    for row in rows:
        start = row["consumed_tokens"] - row["train/global_batch_tokens"]
        if start > clock:
            missing.append((clock, start))
        if DIGEST not in row:
            num_without += 1
        else:
            expected = _by_ledger(trace, row["step"], start, row["consumed_tokens"])
            if expected != row[DIGEST]:
                differs = Disagreement(
                    row["step"], start, row["consumed_tokens"], row[DIGEST], expected
                )
                break
            first = start if first is None else first
            num_steps += 1
        clock = row["consumed_tokens"]
    return Verdict(num_steps, first or 0, clock, tuple(missing), num_without, differs)


def _by_ledger(trace: Trace | VideoTrace, step: int, start_tokens: int, end_tokens: int) -> str:
    """The digest of the step that the ledger has there; or what it has instead of that step."""
    schedule = trace.schedule
    if not (
        start_tokens < schedule.total_tokens and schedule.step_start(start_tokens) == start_tokens
    ):
        return f"no step: none begins at token {start_tokens:,}"
    plan = schedule.at(start_tokens)
    if (plan.step + 1, plan.next_consumed_tokens) != (step, end_tokens):
        return f"step {plan.step + 1:,}, which ends at token {plan.next_consumed_tokens:,}"
    return digest_of(int(trace.identities(plan).sum(dtype=np.uint64)))
