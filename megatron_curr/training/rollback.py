"""Take a run back to one of its checkpoints: what came after is set aside. No torch here.

Afterwards the run is as if it had never gone further: it goes on from there to the bit, and its
future can be amended from there. The ledger says that it was rolled back; checkpoints and rows of
metrics that lie after it stay in the run folder, out of the row.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_curr.curriculum.ledger import (
    amendments,
    append_entries,
    hold_ledger,
    note_rollback,
    read_ledger,
)
from megatron_curr.durable import write_durably
from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.conclude import conclude
from megatron_curr.incarnation.fence import Pen, refuse_if_alive
from megatron_curr.incarnation.record import RolledBack, incarnations
from megatron_curr.training.checkpoint_folder import (
    RunState,
    find_fault,
    go_back,
    list_checkpoints,
    read_state,
)
from megatron_curr.training.follow_metrics import cut_tensorboard
from megatron_curr.training.metrics import drop_rows_after, last_clock
from megatron_curr.training.run_folder import RunFolder


@dataclass(frozen=True)
class Rollback:
    """What a rollback does."""

    to_tokens: int
    to_step: int
    from_tokens: int  # the clock of the newest row or checkpoint
    checkpoints: tuple[str, ...]  # that are set aside
    amendments_ahead: tuple[int, ...]  # first tokens of those that still hold
    is_written: bool

    def as_json(self) -> str:
        """For a script."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """For a person."""
        lines = [
            f"back from token {self.from_tokens:,} to token {self.to_tokens:,}, "
            f"step {self.to_step}",
            f"set aside: {', '.join(self.checkpoints) or 'no checkpoint'}, and the rows of "
            "metrics.jsonl after that token",
        ]
        if self.amendments_ahead:
            tokens = ", ".join(f"{tokens:,}" for tokens in self.amendments_ahead)
            lines.append(
                f"still ahead: the amendment from token {tokens}; megatron-curr amend changes it"
            )
        lines.append("in the ledger" if self.is_written else "nothing is written: a dry run")
        return "\n".join(lines)


def roll_back(
    run_folder: Path, to_tokens: int, *, reason: str = "rolled back", write: bool = True
) -> Rollback:
    """Make the checkpoint at a token the newest of the run, and cut what came after it.

    The same call again finishes one that was interrupted. Raises ``CheckpointError`` where the
    run is alive, or has no intact checkpoint at that token; the folder is then as before.
    """
    folder = RunFolder(run_folder)
    if not folder.ledger.is_file():
        raise CheckpointError(
            f"{run_folder}: no ledger.jsonl, so nothing to roll back; give the folder of a run "
            "that has been started"
        )
    ledger = read_ledger(folder.ledger)
    folder.check_free()
    refuse_if_alive(run_folder)
    states = _states(folder)
    chosen = _chosen(folder, states, to_tokens)
    reached = max(last_clock(folder.metrics), *(s.consumed_tokens for s in states.values()))
    if reached <= to_tokens:
        raise CheckpointError(f"{run_folder}: the run stands at token {to_tokens:,} already")
    state = states[chosen]
    later = tuple(path.name for path, s in states.items() if s.step > state.step)
    done = Rollback(
        to_tokens=to_tokens,
        to_step=state.step,
        from_tokens=reached,
        checkpoints=later,
        amendments_ahead=tuple(
            entry.edition.from_tokens
            for entry in amendments(ledger)
            if entry.edition.from_tokens > to_tokens
        ),
        is_written=write,
    )
    if write:
        with folder.lock():
            _write(folder, done, reason)
    return done


def _write(folder: RunFolder, done: Rollback, reason: str) -> None:
    conclude(folder.path)
    with hold_ledger(folder.ledger):
        ledger = read_ledger(folder.ledger)
        entry = note_rollback(
            ledger, to_tokens=done.to_tokens, from_tokens=done.from_tokens, reason=reason
        )
        append_entries(folder.ledger, [entry])
    go_back(folder.path, before_step=done.to_step + 1)
    pen = Pen.beside(folder.path)
    lost = drop_rows_after(folder.metrics, done.to_tokens, aside=folder.logs, pen=pen)
    pen.folder.rmdir()
    cut_tensorboard(folder.logs / "tensorboard", done.to_tokens)
    for incarnation in incarnations(folder.path)[-1:]:
        told = RolledBack(to_tokens=done.to_tokens, lost_tokens=lost.num_tokens, lost_s=lost.time_s)
        known = incarnation.rolled_back
        write_durably(incarnation.folder / "rolled-back.json", told.after(known).to_json())


def _states(folder: RunFolder) -> dict[Path, RunState]:
    """Every checkpoint whose state can be read, oldest first."""
    states = {}
    for path in list_checkpoints(folder.checkpoints):
        try:
            states[path] = read_state(path)
        except (OSError, ValueError, TypeError):
            continue
    return states


def _chosen(folder: RunFolder, states: dict[Path, RunState], to_tokens: int) -> Path:
    """The checkpoint at this token. Raises ``CheckpointError`` that says which tokens there are."""
    listed = ", ".join(f"{state.consumed_tokens} (step {state.step})" for state in states.values())
    if not states:
        raise CheckpointError(f"{folder.checkpoints}: no checkpoint, so nothing to go back to")
    for path, state in states.items():
        if state.consumed_tokens == to_tokens:
            fault = find_fault(path)
            if fault is None:
                return path
            raise CheckpointError(f"{path}: {fault}; there are checkpoints at tokens {listed}")
    raise CheckpointError(
        f"--to {to_tokens}: no checkpoint at that token; a run goes back to one of its "
        f"checkpoints, which are at tokens {listed}"
    )
