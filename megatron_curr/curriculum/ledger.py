"""The ledger of a run: which curriculum was valid from which token on.

One JSON line an edition, appended and never rewritten; each carries the hash of the line before, so
a past that was edited by hand is found. The samples before an edition's first token are those of
the editions before it, whatever it says: the future can be amended, the past cannot.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from megatron_curr.curriculum.schedule import Edition, Schedule, build_schedule
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.phases import Curriculum

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger."""

    edition: Edition
    reason: str
    previous: str  # hash of the entry before, GENESIS for the first

    @property
    def hash(self) -> str:
        """SHA-256 of the line's content, chained through ``previous``."""
        return hashlib.sha256(self._body().encode()).hexdigest()

    def line(self) -> str:
        """The entry as it stands in the file."""
        return json.dumps({**json.loads(self._body()), "hash": self.hash})

    def _body(self) -> str:
        curriculum = self.edition.curriculum.model_dump(mode="json", by_alias=True)
        body = {
            "from_tokens": self.edition.from_tokens,
            "reason": self.reason,
            "previous": self.previous,
            "curriculum": curriculum,
        }
        return json.dumps(body, sort_keys=True)


def open_ledger(curriculum: Curriculum) -> tuple[Entry, ...]:
    """The ledger of a run that starts now."""
    return (Entry(Edition(0, curriculum), "start", GENESIS),)


def amend(
    ledger: Sequence[Entry], curriculum: Curriculum, *, from_tokens: int, reason: str
) -> tuple[Entry, ...]:
    """The ledger with another future from ``from_tokens`` on, which must be a step's edge.

    Raises ``RecipeError`` where the amendment would touch an earlier one, does not begin at a
    step's edge, or changes what a token before it trained on.
    """
    before = ledger[-1].edition
    if from_tokens < before.from_tokens:
        raise RecipeError(
            f"an amendment from token {from_tokens} would change the past: the last one began at "
            f"token {before.from_tokens}"
        )
    amended = (*ledger, Entry(Edition(from_tokens, curriculum), reason, ledger[-1].hash))
    build_schedule([entry.edition for entry in amended])
    return amended


def ledger_schedule(ledger: Sequence[Entry]) -> Schedule:
    """The schedule that the ledger's editions add up to."""
    return build_schedule([entry.edition for entry in ledger])


def append_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Add entries at the end of the file, each on disk before this returns."""
    with path.open("a") as file:
        for entry in entries:
            file.write(entry.line() + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_ledger(path: Path) -> tuple[Entry, ...]:
    """Every entry, its chain of hashes checked.

    Raises ``CheckpointError`` naming the line that is damaged or was changed. A last line without
    an end was torn while being written, never took effect, and is left out.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise CheckpointError(f"{path}: the ledger cannot be read ({error.strerror})") from None
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        previous = entries[-1].hash if entries else GENESIS
        entries.append(_read_entry(f"{path}:{number}", line, previous))
    if not entries:
        raise CheckpointError(f"{path}: the run's ledger is empty; restore it or start another run")
    return tuple(entries)


def _read_entry(place: str, line: str, previous: str) -> Entry:
    try:
        row = json.loads(line)
        edition = Edition(row["from_tokens"], Curriculum.model_validate(row["curriculum"]))
        entry = Entry(edition, row["reason"], row["previous"])
        claimed = row["hash"]
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(
            f"{place}: not a ledger entry ({type(error).__name__}); restore the file"
        ) from None
    if entry.previous != previous or entry.hash != claimed:
        raise CheckpointError(
            f"{place}: the ledger's chain of hashes breaks here: this line or the one before was "
            f"changed after it was written; restore the file"
        )
    return entry
