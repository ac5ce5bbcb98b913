"""What the ledger says of a run, for its page: amendments, rollbacks, and what each changed."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_curr.curriculum.ledger import amendments, recipe_after
from megatron_curr.recipe.load import recipe_differences
from megatron_curr.report.records import RunRecords


@dataclass(frozen=True)
class LedgerRow:
    """One line of the ledger after the first."""

    at_tokens: int
    mark: str  # beside its line in the figures; empty where it has none
    what: str
    reason: str
    changes: tuple[str, ...]  # of the recipe's curriculum


def ledger_rows(run: RunRecords) -> tuple[LedgerRow, ...]:
    """Every amendment and rollback, in the order in which they were made."""
    held = amendments(run.ledger)
    rows = []
    for number, entry in enumerate(run.ledger[1:], start=1):
        at_tokens = entry.edition.from_tokens
        if entry.rolled_back_from is not None:
            what = f"rolled back, from token {entry.rolled_back_from:,}"
            rows.append(LedgerRow(at_tokens, "rolled back", what, entry.reason, ()))
            continue
        before, after = (recipe_after(run.recipe, run.ledger[:end]) for end in (number, number + 1))
        changes = tuple(
            f"{change.path.removeprefix('curriculum.')}: {_spelt(change.old)} → "
            f"{_spelt(change.new)}"
            for change in recipe_differences(before, after)
            if change.path.startswith("curriculum.")
        )
        holds = any(entry is known for known in held)
        what = "amended" if holds else "amended; a later one took its place"
        mark = "amended" if holds else ""
        rows.append(LedgerRow(at_tokens, mark, what, entry.reason, changes))
    return tuple(rows)


def _spelt(value: object) -> str:
    return "none" if value is None else str(value)
