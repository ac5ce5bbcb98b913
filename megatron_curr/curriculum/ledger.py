"""The ledger of a run: which curriculum was valid from which token on.

One JSON line an edition, appended and never rewritten; each carries the hash of the line before, so
a past that was edited by hand is found. The samples before an edition's first token are those of
the editions before it, whatever it says: the future can be amended, the past cannot.

Who appends holds ``hold_ledger``; so does a running job for the instant in which it looks for new
entries and says from which token on it will take them.

An amendment takes the place of earlier ones that lie ahead of its first token. A *note* changes
nothing ahead: it says that the run was rolled back, from which token to which.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_curr.curriculum.planner import Planner
from megatron_curr.curriculum.schedule import Edition, Schedule, build_schedule
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import AnyRecipe
from megatron_curr.recipe.phases import Curriculum
from megatron_curr.recipe.video_phases import VideoCurriculum

GENESIS = "0" * 64


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the ledger."""

    edition: Edition
    reason: str
    previous: str  # hash of the entry before, GENESIS for the first
    # Every source of the recipe from here on, as JSON; None where they are those of before.
    sources: Mapping[str, Any] | None = None
    # Of a note: the token that the run had reached when it was rolled back to ``from_tokens``.
    rolled_back_from: int | None = None

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
        if self.sources is not None:
            body["sources"] = dict(self.sources)
        if self.rolled_back_from is not None:
            body["rolled_back_from"] = self.rolled_back_from
        return json.dumps(body, sort_keys=True)


def open_ledger(curriculum: Curriculum | VideoCurriculum) -> tuple[Entry, ...]:
    """The ledger of a run that starts now."""
    return (Entry(Edition(0, curriculum), "start", GENESIS),)


def amend(
    ledger: Sequence[Entry],
    curriculum: Curriculum | VideoCurriculum,
    *,
    from_tokens: int,
    reason: str,
    sources: Mapping[str, Any] | None = None,
    planner: Planner | None = None,
) -> tuple[Entry, ...]:
    """The ledger with another future from ``from_tokens`` on, which must be a step's edge.

    What lies before it is not looked at: no job may have read beyond ``from_tokens``. Raises
    ``RecipeError`` where no step begins there.
    """
    edition = Edition(from_tokens, curriculum)
    amended = (*ledger, Entry(edition, reason, ledger[-1].hash, sources))
    ledger_schedule(amended, planner)
    return amended


def note_rollback(
    ledger: Sequence[Entry], *, to_tokens: int, from_tokens: int, reason: str
) -> Entry:
    """The line which says that a run that had reached a token was taken back to an earlier one."""
    edition = Edition(to_tokens, ledger[-1].edition.curriculum)
    return Entry(edition, reason, ledger[-1].hash, rolled_back_from=from_tokens)


def amendments(ledger: Sequence[Entry]) -> list[Entry]:
    """The entries that hold, by their first token: the start, and what was amended since."""
    held: list[Entry] = []
    for entry in ledger:
        if entry.rolled_back_from is None:
            first = entry.edition.from_tokens
            held = [known for known in held if known.edition.from_tokens <= first]
            held.append(entry)
    return held


def recipe_after(recipe: AnyRecipe, ledger: Sequence[Entry]) -> AnyRecipe:
    """The recipe with the curriculum and the sources that the ledger ends with."""
    values = recipe.model_dump(mode="json", by_alias=True)
    values["curriculum"] = ledger[-1].edition.curriculum.model_dump(mode="json", by_alias=True)
    for entry in ledger:
        values["data"]["sources"].update(entry.sources or {})
    return type(recipe).model_validate(values)


def ledger_schedule(ledger: Sequence[Entry], planner: Planner | None = None) -> Schedule:
    """The schedule that the ledger's editions add up to; ``planner`` is ``planner_of`` a recipe."""
    return build_schedule([entry.edition for entry in amendments(ledger)], planner)


def append_entries(path: Path, entries: Sequence[Entry]) -> None:
    """Add entries at the end of the file, all on disk before this returns.

    A last line that was torn while being written goes: it never took effect.
    """
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(entry.line() + "\n" for entry in entries).encode())
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def hold_ledger(path: Path) -> Iterator[None]:
    """Keep every other process from appending. Not to be held for longer than an instant.

    Ctrl-Z and the like wait meanwhile: a job that steps must not wait for a sleeping holder.
    """
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    patient = {signal.SIGINT, signal.SIGTERM, signal.SIGTSTP, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, patient)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def read_ledger(path: Path) -> tuple[Entry, ...]:
    """Every entry, its chain of hashes checked.

    Raises ``CheckpointError`` naming the line that is damaged or was changed. A last line without
    an end was torn while being written, never took effect, and is left out.
    """
    try:
        text = path.read_text()
    except OSError as error:
        raise CheckpointError(f"{path}: the ledger cannot be read ({error.strerror})") from None
    return parse_ledger(text, path)


def parse_ledger(text: str, path: Path) -> tuple[Entry, ...]:
    """The entries in a ledger's text; ``path`` is for messages. Raises like ``read_ledger``."""
    entries: list[Entry] = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        previous = entries[-1].hash if entries else GENESIS
        entries.append(_read_entry(f"{path}:{number}", line, previous))
    if not entries:
        raise CheckpointError(f"{path}: the run's ledger is empty; restore it or start another run")
    return tuple(entries)


def _curriculum(content: dict[str, Any]) -> Curriculum | VideoCurriculum:
    """Phases of text have a sequence length, phases of video none."""
    is_text = any("seq_length" in phase for phase in content["phases"])
    return (Curriculum if is_text else VideoCurriculum).model_validate(content)


def _read_entry(place: str, line: str, previous: str) -> Entry:
    try:
        row = json.loads(line)
        edition = Edition(row["from_tokens"], _curriculum(row["curriculum"]))
        entry = Entry(
            edition,
            row["reason"],
            row["previous"],
            row.get("sources"),
            row.get("rolled_back_from"),
        )
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
