"""A running job takes up amendments of its future, on all ranks at the same step.

Before every step rank 0 looks at the ledger, under its lock, and moves the horizon to that step's
end; what ``megatron-curr amend`` appends begins there or later. The number of new entries travels
beside the loss, at no cost of its own, so every rank knows of them when the step is over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import torch.distributed as dist

from megatron_curr.curriculum.ledger import Entry, hold_ledger, parse_ledger, recipe_after
from megatron_curr.curriculum.schedule import StepPlan
from megatron_curr.training.amend import HORIZON
from megatron_curr.training.hooks import Quiet
from megatron_curr.training.preflight import Prepared, prepare
from megatron_curr.training.run import Run
from megatron_curr.training.run_folder import RunFolder

log = logging.getLogger(__name__)

_DIGITS = 20


class LedgerWatch:
    """On rank 0: looks for new entries and keeps the horizon. Knows how long the ledger is."""

    def __init__(self, folder: RunFolder, horizon_path: os.PathLike[str]) -> None:
        self._path = folder.ledger
        self._horizon = os.open(horizon_path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._num_bytes = -1

    def look(self, horizon_tokens: int) -> bool:
        """Whether the ledger has grown; nothing before the horizon is amended from now on."""
        with hold_ledger(self._path):
            os.pwrite(self._horizon, f"{horizon_tokens:0{_DIGITS}d}\n".encode(), 0)
            num_bytes = os.stat(self._path).st_size
        has_grown, self._num_bytes = num_bytes != self._num_bytes, num_bytes
        return has_grown

    def read(self) -> list[str]:
        """The ledger's whole lines."""
        with hold_ledger(self._path):
            return self._path.read_text(encoding="utf-8").splitlines(keepends=True)

    def close(self) -> None:
        """Let go of the horizon's file."""
        os.close(self._horizon)


class TakeAmendments(Quiet):
    """Brings the run's plan up to the ledger when it starts, and whenever it grows."""

    def __init__(self, ledger: Sequence[Entry], replan: Callable[[Run, Prepared], None]) -> None:
        self._ledger = tuple(ledger)
        self._replan = replan

    def before_run(self, run: Run) -> None:
        """Every rank plans by the ledger as rank 0 sees it now."""
        if run.groups.rank == 0:
            run.ledger_watch = LedgerWatch(run.folder, run.life.incarnation.folder / HORIZON)
            run.ledger_watch.look(_horizon(run))
        self._take(run)

    def after_step(self, run: Run, plan: StepPlan) -> None:
        """Take up what rank 0 has found before the step."""
        if run.has_amendments:
            self._take(run)

    def after_run(self, run: Run) -> None:
        """No step follows: the future begins at the clock."""
        if run.ledger_watch is not None:
            run.ledger_watch.look(run.consumed_tokens)
            run.ledger_watch.close()
            run.ledger_watch = None

    def _take(self, run: Run) -> None:
        told = [run.ledger_watch.read() if run.ledger_watch is not None else []]
        dist.broadcast_object_list(told, src=0)
        entries = parse_ledger("".join(told[0]), run.folder.ledger)
        known, self._ledger = self._ledger, entries
        if entries[-1].hash == known[-1].hash:
            return
        prepared = prepare(
            recipe_after(run.recipe, entries),
            run.groups.world_size,
            ledger=entries,
            looks_at_data=False,  # the one who amended has
        )
        self._replan(run, prepared)
        for entry in entries[len(known) :]:
            if entry.rolled_back_from is not None:
                continue
            log.info(
                "amended from token %d on (%s); the run ends at token %d now",
                entry.edition.from_tokens,
                entry.reason,
                run.schedule.total_tokens,
            )


def _horizon(run: Run) -> int:
    if run.is_complete:
        return run.consumed_tokens
    return run.schedule.at(run.consumed_tokens).next_consumed_tokens
