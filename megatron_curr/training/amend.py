"""Amend the future of a run: check it, say what changes, append it to the ledger. No torch here.

A running job says in its incarnation's ``horizon`` from which token on it will still take
amendments: the end of the step it is in. It looks for new entries before every step, under the
ledger's lock; an amendment is appended under the same lock and from the horizon on, so what a job
has read is never amended, however slow either of the two is.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_curr.curriculum.differences import Change, schedule_differences
from megatron_curr.curriculum.ledger import (
    Entry,
    amend,
    append_entries,
    hold_ledger,
    ledger_schedule,
    read_ledger,
)
from megatron_curr.curriculum.lots import planner_of
from megatron_curr.curriculum.schedule import Schedule
from megatron_curr.durable import write_durably
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.incarnation.record import Incarnation, incarnations
from megatron_curr.recipe.load import (
    AnyRecipe,
    Difference,
    dump_recipe,
    load_recipe,
    recipe_differences,
)
from megatron_curr.training.preflight import Prepared, prepare
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.units import format_count

HORIZON = "horizon"
_MOST_TRIES = 12
_LEAP = 1.5  # times the rate that was planned


@dataclass(frozen=True)
class Amendment:
    """What an amendment does, and from where."""

    from_tokens: int
    horizon_tokens: int
    changes: list[Change]
    old_end_tokens: int
    new_end_tokens: int
    new_sources: tuple[str, ...]
    ignored: tuple[str, ...]  # settings that only another start of the run can change
    is_running: bool
    is_written: bool
    asked_tokens: int | None = None  # where --from said, if that is not where a step begins
    jump: tuple[float, float] | None = None  # of the rate at its first token, if it is a leap

    def as_json(self) -> str:
        """For a script."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """For a person: where it begins, and every difference by token."""
        lines = [f"from token {self.from_tokens:,} on{self._why_there()}:"]
        for change in self.changes:
            span = f"{format_count(change.from_tokens)} to {format_count(change.to_tokens)}"
            lines.append(f"  {span:>18}  {change}")
        if self.new_end_tokens != self.old_end_tokens:
            lines.append(f"the end moves from {self.old_end_tokens:,} to {self.new_end_tokens:,}")
        if self.jump is not None:
            before, after = (f"{rate:.3g}" for rate in self.jump)
            lines.append(
                f"the learning rate leaps at token {self.from_tokens:,}, from {before} to {after}"
            )
        if self.new_sources:
            lines.append(f"new sources: {', '.join(self.new_sources)}")
        if self.ignored:
            lines.append(f"left as they are in a running run: {', '.join(self.ignored)}")
        if not self.is_written:
            lines.append("nothing is written: a dry run")
        elif self.is_running:
            lines.append("in the ledger; the running job takes it up at its next step")
        else:
            lines.append("in the ledger; the next start of the run takes it up")
        return "\n".join(lines)

    def _why_there(self) -> str:
        if self.asked_tokens is None:
            return ""
        if self.asked_tokens > self.from_tokens:
            return f", the end of the run (--from said {self.asked_tokens:,})"
        return f", where a step begins (--from said {self.asked_tokens:,})"


def amend_run(
    run_folder: Path,
    wanted: AnyRecipe,
    *,
    from_tokens: int | None = None,
    reason: str = "amended",
    extend: bool = False,
    write: bool = True,
) -> Amendment:
    """Append ``wanted``'s curriculum and sources to the run's ledger, from a token on.

    Without ``from_tokens``, from the next step that can still be changed; one past the end of the
    run is refused, or with ``extend`` taken for the end. Raises ``UserError``
    where the amendment is invalid, touches the past or changes nothing; the ledger is then as
    before. Nothing is appended without ``write``.
    """
    folder = RunFolder(run_folder)
    if not folder.ledger.is_file():
        raise CheckpointError(
            f"{run_folder}: no ledger.jsonl, so nothing to amend; give the folder of a run that "
            "has been started, or change its recipe before it starts"
        )
    old = load_recipe(folder.recipe)
    merged, ignored = _merge(old, wanted)
    margin_steps = 0
    for _ in range(_MOST_TRIES):
        ledger = read_ledger(folder.ledger)
        schedule, horizon = ledger_schedule(ledger, planner_of(old)), horizon_of(folder)
        at = _place(schedule, horizon, from_tokens, margin_steps, extend=extend)
        entry, prepared = _checked(folder, merged, ledger, from_tokens=at, reason=reason)
        changes = schedule_differences(schedule, prepared.schedule, from_tokens=at)
        if not changes:
            raise RecipeError(
                f"{run_folder}: the recipe changes nothing from token {at:,} on, where the run can "
                "still be amended; edit a phase that is ahead, or the rest of the current one"
            )
        done = Amendment(
            from_tokens=at,
            horizon_tokens=horizon,
            changes=changes,
            old_end_tokens=schedule.total_tokens,
            new_end_tokens=prepared.schedule.total_tokens,
            new_sources=tuple(n for n in merged.data.sources if n not in old.data.sources),
            ignored=ignored,
            is_running=_is_running(folder),
            is_written=write,
            asked_tokens=None if from_tokens in (None, at) else from_tokens,
            jump=_jump(schedule, prepared.schedule, at),
        )
        if not write or _append(folder, ledger, entry, prepared):
            return done
        margin_steps = max(2 * margin_steps, 1)  # the job went past it, or another one amended
    raise CheckpointError(
        f"{run_folder}: the run moves on faster than the amendment can be checked; give a later "
        "token with --from"
    )


def _checked(
    folder: RunFolder,
    recipe: AnyRecipe,
    ledger: Sequence[Entry],
    *,
    from_tokens: int,
    reason: str,
) -> tuple[Entry, Prepared]:
    """The entry to append, and what the run then is; new sources are opened, the order is laid."""
    amended = amend(
        ledger,
        recipe.curriculum,
        from_tokens=from_tokens,
        reason=reason,
        sources=recipe.model_dump(mode="json", by_alias=True)["data"]["sources"],
        planner=planner_of(recipe),
    )
    return amended[-1], prepare(recipe, _world_size(folder, recipe), ledger=amended)


def _append(folder: RunFolder, ledger: Sequence[Entry], entry: Entry, prepared: Prepared) -> bool:
    """Append unless the job has passed the token, or another amendment came first."""
    with hold_ledger(folder.ledger):
        now = read_ledger(folder.ledger)
        if now[-1].hash != ledger[-1].hash:
            return False
        if entry.edition.from_tokens < horizon_of(folder):
            return False
        write_durably(folder.recipe, dump_recipe(prepared.recipe))
        folder.add_data(prepared.data)
        append_entries(folder.ledger, [entry])
        return True


def _jump(old: Schedule, new: Schedule, at: int) -> tuple[float, float] | None:
    """The learning rate before and after a token, where the amendment makes it leap there."""
    if not 0 < at < new.total_tokens:
        return None
    before = old.at(old.step_start(at - 1)).learning_rate
    planned = old.at(at).learning_rate if at < old.total_tokens else before
    after = new.at(at).learning_rate
    low, high = sorted((planned, after))
    return (before, after) if high > _LEAP * low else None


def _place(
    schedule: Schedule, horizon: int, from_tokens: int | None, margin_steps: int, *, extend: bool
) -> int:
    """The token from which to amend: a step's edge that no job has passed."""
    if from_tokens is None:
        at = horizon
        for _ in range(margin_steps):
            at = schedule.at(at).next_consumed_tokens if at < schedule.total_tokens else at
        return at
    if from_tokens > schedule.total_tokens and not extend:
        raise RecipeError(
            f"--from {from_tokens}: the run ends at token {schedule.total_tokens}, so nothing can "
            "change from there on; to make it longer from its end, give --extend or leave --from "
            "out, and look at the learning rate there"
        )
    edge = schedule.step_start(from_tokens)
    if edge < min(from_tokens, schedule.total_tokens):
        edge = schedule.at(edge).next_consumed_tokens
    if edge < horizon:
        raise RecipeError(
            f"--from {from_tokens}: the past is closed: this run can be amended from token "
            f"{horizon} on; give that one or a later one, or leave --from out"
        )
    return edge


def _merge(old: AnyRecipe, wanted: AnyRecipe) -> tuple[AnyRecipe, tuple[str, ...]]:
    """The run's recipe with the wanted curriculum and sources, and what of ``wanted`` stays out."""
    if type(old) is not type(wanted):
        raise RecipeError("the run and the recipe are of different kinds: text and video")
    refused: list[Difference] = []
    ignored: list[Difference] = []
    for change in recipe_differences(old, wanted):
        section, _, rest = change.path.partition(".")
        source = rest.removeprefix("sources.").split(".")[0]
        if section == "curriculum":
            continue
        if change.path.startswith("data.sources.") and source not in old.data.sources:
            continue
        (ignored if change.allowed else refused).append(change)
    if refused:
        listed = "\n".join(f"  {c.path}: was {c.old!r}, is {c.new!r}" for c in refused)
        raise RecipeError(
            f"an amendment may change the curriculum and add sources, nothing else:\n{listed}\n"
            "  put the old values back, or start a new run under another name"
        )
    values = old.model_dump(mode="json", by_alias=True)
    new = wanted.model_dump(mode="json", by_alias=True)
    values["curriculum"] = new["curriculum"]
    values["data"]["sources"] = {**values["data"]["sources"], **new["data"]["sources"]}
    return type(old).model_validate(values), tuple(str(change.path) for change in ignored)


def horizon_of(folder: RunFolder) -> int:
    """The first token that can still be amended.

    Of a run that may be alive, everything before it may have been read. One that is over goes on
    from its newest checkpoint: what it had read after that is not in the weights, and is read anew.
    """
    newest = _newest(folder)
    if newest is not None and newest.record is None:
        with contextlib.suppress(OSError, ValueError):
            return int((newest.folder / HORIZON).read_text())
    state = folder.newest_state()
    return state.consumed_tokens if state else 0


def _world_size(folder: RunFolder, recipe: AnyRecipe) -> int:
    """Ranks of the newest start, which the layout must fit; else the fewest that it fits."""
    newest = _newest(folder)
    claim = newest.claim if newest is not None else None
    layout = recipe.parallel
    fewest = (
        layout.tensor_model_parallel_size
        * layout.pipeline_model_parallel_size
        * layout.context_parallel_size
    )
    return claim.num_ranks if claim is not None else fewest


def _is_running(folder: RunFolder) -> bool:
    newest = _newest(folder)
    return newest is not None and newest.record is None


def _newest(folder: RunFolder) -> Incarnation | None:
    known = incarnations(folder.path)
    return known[-1] if known else None
