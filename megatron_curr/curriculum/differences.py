"""What two schedules do differently, by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from megatron_curr.curriculum.lots import VideoCurves
from megatron_curr.curriculum.schedule import Schedule
from megatron_curr.recipe.video_phases import TASKS

_SAME = 1e-12


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs over a range of tokens; the values are at its first and last step."""

    from_tokens: int
    to_tokens: int
    what: str  # phase, seq_length, global_batch_tokens, learning_rate, mixture.<source>...
    before: tuple[str | float | None, str | float | None]
    after: tuple[str | float | None, str | float | None]

    def __str__(self) -> str:
        return f"{self.what}: {_spelt(self.before)} -> {_spelt(self.after)}"


def _spelt(values: tuple[str | float | None, str | float | None]) -> str:
    first, last = (
        f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)
        for value in values
    )
    return first if first == last else f"{first}..{last}"


Values = dict[str, str | float]

# What is read off a step, and the curve whose edges are where it may change inside a phase.
_CURVES = {
    "phase": None,
    "seq_length": None,
    "global_batch_tokens": "batch_tokens",
    "learning_rate": "learning_rate",
    "weight_decay": "weight_decay",
    "mixture": "mixture",
}
_VIDEO_CURVES = {
    **{kind: curve for kind, curve in _CURVES.items() if kind != "seq_length"},
    "buckets": "buckets",
    "tasks": "tasks",
    "timestep_shift": "timestep_shift",
}


def schedule_differences(old: Schedule, new: Schedule, *, from_tokens: int = 0) -> list[Change]:
    """Every difference from a token on, by the pieces between places where either one changes."""
    changes: list[Change] = []
    is_video = isinstance(old.stretches[0].curves, VideoCurves)
    for kind, curve in (_VIDEO_CURVES if is_video else _CURVES).items():
        for start, end in _pieces(old, new, curve, from_tokens):
            before = [_values_at(old, kind, tokens) for tokens in (start, end - 1)]
            after = [_values_at(new, kind, tokens) for tokens in (start, end - 1)]
            for name in dict.fromkeys(name for values in (*before, *after) for name in values):
                was = (before[0].get(name), before[1].get(name))
                now = (after[0].get(name), after[1].get(name))
                if not all(map(_same, was, now)):
                    changes.append(Change(start, end, name, was, now))
    return _joined(changes)


def _pieces(
    old: Schedule, new: Schedule, curve: str | None, from_tokens: int
) -> Iterator[tuple[int, int]]:
    end = max(old.total_tokens, new.total_tokens)
    edges = {from_tokens, end}
    for schedule in (old, new):
        for stretch in schedule.stretches:
            edges |= {stretch.start_tokens, stretch.end_tokens}
            for ramp in getattr(stretch.curves, curve).ramps if curve else ():
                edges |= {math.ceil(ramp.start_tokens), math.ceil(ramp.end_tokens)}
    return pairwise(sorted(edge for edge in edges if from_tokens <= edge <= end))


def _values_at(schedule: Schedule, kind: str, tokens: int) -> Values:
    """What the step that consumes this token does; nothing behind the end."""
    if tokens >= schedule.total_tokens:
        return {}
    if kind == "mixture":
        weights = schedule.weights_at(tokens)
        return {f"mixture.{name}": weight for name, weight in weights.items() if weight}
    curves = schedule.stretch_at(tokens).curves
    if isinstance(curves, VideoCurves) and kind in ("buckets", "tasks"):
        names = curves.bucket_names if kind == "buckets" else TASKS
        weights = dict(zip(names, getattr(curves, kind).at(tokens).tolist(), strict=True))
        return {f"{kind}.{name}": weight for name, weight in weights.items() if weight}
    if isinstance(curves, VideoCurves) and kind == "timestep_shift":
        return {kind: curves.timestep_shift.at(tokens)}
    if isinstance(curves, VideoCurves) and kind == "global_batch_tokens":
        return {kind: curves.batch_tokens.at(tokens)}  # steps of lots are about that large
    plan = schedule.at(schedule.step_start(tokens))
    value = plan.step_tokens if kind == "global_batch_tokens" else getattr(plan, kind)
    return {kind: value}


def _same(one: str | float | None, other: str | float | None) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9, abs_tol=_SAME)
    return one == other


def _joined(changes: list[Change]) -> list[Change]:
    """Pieces that follow each other with one constant change are one."""
    joined: list[Change] = []
    for change in changes:
        match = next(
            (
                index
                for index, earlier in enumerate(joined)
                if earlier.to_tokens == change.from_tokens
                and earlier.what == change.what
                and set(earlier.before + change.before) == {change.before[0]}
                and set(earlier.after + change.after) == {change.after[0]}
            ),
            None,
        )
        if match is None:
            joined.append(change)
        else:
            earlier = joined[match]
            joined[match] = Change(
                earlier.from_tokens, change.to_tokens, change.what, change.before, change.after
            )
    return joined
