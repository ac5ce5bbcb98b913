"""Where the time of a run went, over all its incarnations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_curr.incarnation.conclude import judge
from megatron_curr.incarnation.record import TIMES, Record, incarnations


@dataclass(frozen=True)
class Accounts:
    """Sums over the incarnations of a run. ``times_s`` is by the names in ``TIMES``."""

    records: tuple[Record, ...]
    times_s: dict[str, float]
    wall_s: float  # waiting in queues and running; not idle between an end and the next start
    lost_s: float  # steps taken again, because a checkpoint did not hold them
    lost_tokens: int

    @property
    def effective_frac(self) -> float:
        """Effective-training-time ratio: seconds of steps that counted over the wall clock."""
        return max(self.times_s["compute"] - self.lost_s, 0.0) / self.wall_s if self.wall_s else 0.0

    @property
    def effective_running_frac(self) -> float:
        """The same without the queue: over the time in which the run had its nodes."""
        running_s = self.wall_s - self.times_s["queue"]
        return max(self.times_s["compute"] - self.lost_s, 0.0) / running_s if running_s else 0.0


def read_accounts(run_folder: Path) -> Accounts | None:
    """The accounts of a run; one that still goes on is counted up to its last sign of life."""
    known = incarnations(run_folder)
    found = [i.record or judge(run_folder, i) for i in known]
    records = [record for record in found if record is not None]
    if not records:
        return None
    accounts, taken = add_up(records), [told for i in known if (told := i.rolled_back)]
    return replace(
        accounts,
        lost_s=accounts.lost_s + sum(told.lost_s for told in taken),
        lost_tokens=accounts.lost_tokens + sum(told.lost_tokens for told in taken),
    )


def add_up(records: Sequence[Record]) -> Accounts:
    """Sum the times of one record or more, oldest first."""
    times_s = {name: sum(r.times_s.get(name, 0.0) for r in records) for name in TIMES}
    return Accounts(
        records=tuple(records),
        times_s=times_s,
        wall_s=sum(r.ended_at_s - r.began_at_s + r.times_s.get("queue", 0.0) for r in records),
        lost_s=sum(r.lost_s for r in records),
        lost_tokens=sum(r.lost_tokens for r in records),
    )
