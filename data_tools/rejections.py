"""Rows that give no document: how many a run stands, and the list of them.

The list is ``rejects.jsonl``: file, line, byte offset, reason, and the fields that the row has. A
run that fails for its rejects leaves the list in its staging area.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from data_tools.rows import EMPTY_FILES
from data_tools.unit_work import RECORD, REJECTS, UnitRecord, total
from data_tools.workers import WorkFailed

if TYPE_CHECKING:
    from data_tools.preprocess_text import Run

_MIN_ROWS_TO_JUDGE = 1_000  # before that, a few bad rows at the start say little


class TooManyRejected(WorkFailed):
    """More rows gave no document than the run was told to stand."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Rows so far, and how much of the corpus they are."""

    read_bytes: int = 0
    rows: int = 0  # documents, those that were filtered out, and rejects
    rejects: int = 0

    def plus(self, read_bytes: int, rows: int, rejects: int) -> Tally:
        return Tally(self.read_bytes + read_bytes, self.rows + rows, self.rejects + rejects)


def tally_of(run: Run) -> Tally:
    """What the units hold that are finished."""
    records = (run.unit_folder / unit.key for unit in run.units)
    return _tally(UnitRecord.read(folder) for folder in records if (folder / RECORD).is_file())


def _tally(records: Iterable[UnitRecord]) -> Tally:
    tally = Tally()
    for record in records:
        rejects = sum(record.rejects.values())
        rows = record.num_documents + record.filtered + rejects
        tally = tally.plus(record.read_bytes, rows, rejects)
    return tally


def told(counts: Mapping[str, int]) -> str:
    """``3 invalid JSON, 1 empty text``."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())


def check_rejects_so_far(run: Run, tally: Tally) -> None:
    """Stop a run that would be over the limit even if all it has not read yet were good, by the
    size of its rows so far: a bad beginning alone does not end a run."""
    if tally.rows < _MIN_ROWS_TO_JUDGE or not tally.read_bytes:
        return
    whole_bytes = sum(unit.num_bytes for unit in run.units)
    expected_rows = tally.rows * max(whole_bytes / tally.read_bytes, 1)
    if tally.rejects > run.settings.max_rejected_frac * expected_rows:
        listing = _list_so_far(run)
        rejects = max(tally.rejects, listing.reasons.total())  # the workers go on meanwhile
        rows = tally.rows + rejects - tally.rejects
        raise _too_many(run, listing, rejects, f"{rows:,} rows so far")


def check_rejects(run: Run, records: Sequence[UnitRecord]) -> None:
    """Fail a run of which too much was rejected."""
    tally = _tally(records)
    if tally.rejects > run.settings.max_rejected_frac * tally.rows:
        listing = list_rejects(run, records, run.staging)
        raise _too_many(run, listing, tally.rejects, f"{tally.rows:,} rows")


@dataclass(slots=True)
class _Listing:
    """What was listed, and the first of it."""

    path: Path
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, Any] | None = None

    def write(self, places: Iterator[dict[str, Any]]) -> None:
        with open(self.path, "wb") as stream:
            for place in places:
                stream.write(orjson.dumps(place) + b"\n")
                if place["reason"] != EMPTY_FILES:
                    self.reasons[place["reason"]] += 1
                    self.first = self.first or place
            stream.flush()
            os.fsync(stream.fileno())


def list_rejects(run: Run, records: Sequence[UnitRecord], folder: Path) -> _Listing:
    """List the rejected rows of all units, each by its line in the whole file, in ``folder``."""

    def places() -> Iterator[dict[str, Any]]:
        for unit, base in zip(run.units, line_bases(run, records), strict=True):
            for place in _places(run.unit_folder / unit.key / REJECTS):
                del place["first"]
                place["line"] += base
                yield place

    listing = _Listing(folder / REJECTS)
    listing.write(places())
    return listing


def _list_so_far(run: Run) -> _Listing:
    """List what all units, finished or not, have rejected. In a part of a file, lines are counted
    only once the parts before it are read: there the byte offset has to do."""

    def places() -> Iterator[dict[str, Any]]:
        names = {name.partition(".")[0]: name for name in os.listdir(run.unit_folder)}
        for unit in run.units:
            for place in _places(run.unit_folder / names.get(unit.key, unit.key) / REJECTS):
                if place.pop("first"):
                    place["line"] = None
                yield place

    listing = _Listing(run.staging / REJECTS)
    listing.write(places())
    return listing


def line_bases(run: Run, records: Sequence[UnitRecord]) -> list[int]:
    """For each unit, how many rows of its file stand before it in other units.

    A file that is cut has its units to itself, so one number a unit is enough.
    """
    bases = []
    rows_of: dict[str, int] = {}
    for unit, record in zip(run.units, records, strict=True):
        last = unit.spans[-1].file
        bases.append(rows_of.get(unit.spans[0].file, 0))
        rows_of[last] = rows_of.get(last, 0) + record.rows
    return bases


def _places(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a unit's list, which may have got its final name meanwhile."""
    final = path.parent.with_name(path.parent.name.partition(".")[0]) / path.name
    for candidate in (path, final):
        if candidate.is_file():
            with open(candidate, "rb") as stream:
                yield from (orjson.loads(line) for line in stream if line.endswith(b"\n"))
            return


def _too_many(run: Run, listing: _Listing, rejects: int, rows: str) -> TooManyRejected:
    first = listing.first or {}
    place = first.get("file", "")
    place += f", line {first['line']:,}" if first.get("line") else ""
    if first.get("fields"):
        place += f", which has the fields {', '.join(first['fields'])}"
    return TooManyRejected(
        f"{run.output}: {rejects:,} of {rows} rejected ({told(total([listing.reasons]))}), more "
        f"than --max-rejected {run.settings.max_rejected_frac:g} allows. The first is {place}; "
        f"{listing.path} lists them. Nothing was published, what is finished is kept: mend the "
        "input (--text-field names the field of the text), or raise --max-rejected and run the "
        "same command again"
    )
