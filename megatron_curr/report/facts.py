"""What a run did, computed from its records: mixture, phases, restarts, step times."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from megatron_curr.report.records import RunRecords
from megatron_curr.report.values import Floats

MOST_COLOURED_SOURCES = 8
REST = "rest"
NEIGHBOUR_STEPS = 15


@dataclass(frozen=True)
class SourceGroup:
    """Sources that are drawn as one: a single one, or the smallest ones of many."""

    label: str
    colour: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class PhaseFacts:
    """One row of the table of phases. Token counts are of what was trained so far."""

    name: str
    seq_length: int  # of a sample; for video, the mean of a lot, in the phase's first step
    planned_tokens: int
    consumed_tokens: int
    num_samples: int  # for video, about how many lots
    num_steps: int
    batch_tokens: tuple[float, float]
    learning_rate: tuple[float, float]
    planned_source_tokens: dict[str, float]
    consumed_source_tokens: dict[str, float]
    epochs: dict[str, float]
    step_time_s: tuple[float, float, float]  # 50th, 95th, 99th percentile


@dataclass(frozen=True)
class Switch:
    """Step time around a phase switch, against the steps before and after it."""

    into: str
    consumed_tokens: int
    seq_length_changes: bool
    step_time_s: float
    slowdown: float  # time per token of the first step, over its neighbours' median


def source_groups(run: RunRecords) -> tuple[SourceGroup, ...]:
    """Colours for the sources: each its own up to eight, else the eight largest and the rest."""
    if len(run.sources) <= MOST_COLOURED_SOURCES:
        return tuple(SourceGroup(name, f"c{i}", (name,)) for i, name in enumerate(run.sources))
    planned = planned_tokens(run, np.array([0.0, float(run.schedule.total_tokens)]))
    ranked = sorted(run.sources, key=lambda name: -float(planned[name][-1]))
    top = set(ranked[:MOST_COLOURED_SOURCES])
    shown = [name for name in run.sources if name in top]
    rest = tuple(name for name in run.sources if name not in top)
    groups = [SourceGroup(name, f"c{i}", (name,)) for i, name in enumerate(shown)]
    return (*groups, SourceGroup(f"{len(rest)} others", REST, rest))


def plan_grid(run: RunRecords, num_points: int = 1200) -> Floats:
    """Places on the token clock to draw the plan at: even ones, and both sides of every switch."""
    total = float(run.schedule.total_tokens)
    edges = [float(phase.start_tokens) for phase in run.phases]
    for stretch in run.schedule.stretches:
        ramps = stretch.curves.mixture.ramps
        edges += [float(ramp.start_tokens) for ramp in ramps]
        edges += [float(ramp.end_tokens) for ramp in ramps]
    edges = [edge for edge in edges if 0 <= edge < total]
    sides = [edge - 1 for edge in edges if edge > 0]
    grid = np.concatenate([np.linspace(0, max(total - 1, 0), num_points), edges, sides])
    return np.unique(np.floor(grid))


def planned_shares(run: RunRecords, grid: Floats) -> dict[str, Floats]:
    """Planned share of every source at each place of the clock."""
    rows = [run.schedule.weights_at(int(tokens)) for tokens in grid]
    return {
        name: np.array([row.get(name, 0.0) for row in rows], dtype=np.float64)
        for name in run.sources
    }


def planned_tokens(run: RunRecords, at_tokens: Floats) -> dict[str, Floats]:
    """Tokens the plan gives every source before each place of the clock."""
    grid = plan_grid(run)
    shares = planned_shares(run, grid)
    ends = np.append(grid[1:], float(run.schedule.total_tokens))
    planned: dict[str, Floats] = {}
    for name, share in shares.items():
        after = np.append(share[1:], share[-1])
        # Trapezoids inside a phase; across the one-token gap at a switch the error is one token.
        area = np.cumsum((share + after) / 2 * (ends - grid))
        planned[name] = np.interp(at_tokens, np.append(grid[:1], ends), np.append(0.0, area))
    return planned


def consumed_by_source(run: RunRecords) -> dict[str, Floats]:
    """Tokens read from every source after each step; a row without the value repeats the last."""
    consumed: dict[str, Floats] = {}
    for name in run.sources:
        column = run.steps.column(f"data/{name}/consumed_tokens")
        filled = np.where(np.isfinite(column), column, 0.0)
        consumed[name] = np.maximum.accumulate(filled) if len(filled) else filled
    return consumed


def largest_mixture_gap(run: RunRecords) -> tuple[float, str]:
    """Most tokens by which a source was ever off its plan, and which source that was."""
    clock = run.steps.column("consumed_tokens")
    planned, consumed = planned_tokens(run, clock), consumed_by_source(run)
    gaps = {
        name: float(np.abs(planned[name] - consumed[name]).max()) if len(clock) else 0.0
        for name in run.sources
    }
    worst = max(gaps, key=lambda name: gaps[name])
    return gaps[worst], worst


def restarts(run: RunRecords) -> tuple[float, ...]:
    """Clock at every place where the run was taken up again."""
    clock = run.starts.column("consumed_tokens")
    return tuple(sorted({float(tokens) for tokens in clock[1:] if tokens > 0}))


def first_steps(run: RunRecords) -> set[int]:
    """Indices of the step rows that opened a process: slow for reasons of their own."""
    clock = run.steps.column("consumed_tokens")
    after = [int(np.searchsorted(clock, tokens, side="right")) for tokens in restarts(run)]
    return {0, *after} if len(clock) else set()


def uncounted(run: RunRecords) -> tuple[str, ...]:
    """Sentences on losses that are means over nothing, and are therefore none."""
    told: list[str] = []
    losses = run.steps.column(f"train/{run.loss}")
    refused = np.isfinite(run.steps.column("train/nonfinite_first_position"))
    num_empty = int((~np.isfinite(losses) & ~refused).sum())
    if num_empty:
        told.append(
            f"In {num_empty:,} of {len(run.steps):,} steps nothing counted: they have no loss and "
            "no gradient."
        )
    consumed = consumed_by_source(run)
    for name in run.sources:
        is_read = bool(len(consumed[name])) and consumed[name][-1] > 0
        if is_read and not np.isfinite(run.steps.column(f"train/{name}/{run.loss}")).any():
            told.append(f"Nothing that was read of {name} counts: it has no training loss.")
        is_held_out = f"eval/{name}/{run.loss}" in run.evaluations.names()
        if is_held_out and not np.isfinite(run.evaluations.column(f"eval/{name}/{run.loss}")).any():
            told.append(f"Nothing that is held out of {name} counts: it has no held-out loss.")
    return tuple(told)


def relative_step_times(run: RunRecords) -> Floats:
    """Each step's time per token over the median of its neighbours of the same sequence length."""
    times_s = run.steps.column("perf/step_time_s")
    per_token = times_s / run.steps.column("train/global_batch_tokens")
    lengths = run.steps.column("train/seq_length_tokens")
    if run.buckets:  # a step of video holds several lengths, in shares that change slowly
        lengths = np.zeros(len(per_token))
    relative = np.full(len(per_token), np.nan)
    for index in range(len(per_token)):
        near = slice(max(index - NEIGHBOUR_STEPS, 0), index + NEIGHBOUR_STEPS + 1)
        same = per_token[near][lengths[near] == lengths[index]]
        same = same[np.isfinite(same)]
        if len(same) >= 3:
            relative[index] = per_token[index] / float(np.median(same))
    return relative


def switches(run: RunRecords) -> tuple[Switch, ...]:
    """The first step of every phase that the run has entered while it ran."""
    relative, times_s = relative_step_times(run), run.steps.column("perf/step_time_s")
    found: list[Switch] = []
    for before, row, index in zip(
        run.steps.rows, run.steps.rows[1:], range(1, len(run.steps)), strict=False
    ):
        if row["phase"] != before["phase"] and math.isfinite(times_s[index]):
            lengths = [r.get("train/seq_length_tokens") for r in (before, row)]
            found.append(
                Switch(
                    into=str(row["phase"]),
                    consumed_tokens=int(before["consumed_tokens"]),
                    seq_length_changes=lengths[0] != lengths[1],
                    step_time_s=float(times_s[index]),
                    slowdown=float(relative[index]),
                )
            )
    return tuple(found)


def phase_facts(run: RunRecords) -> tuple[PhaseFacts, ...]:
    """One entry a phase, in order, also for those still ahead."""
    names = np.array([str(row["phase"]) for row in run.steps.rows])
    facts: list[PhaseFacts] = []
    for index, phase in enumerate(run.phases):
        bounds = np.array([phase.start_tokens, phase.end_tokens], dtype=np.float64)
        steps = run.steps.where(names == phase.name)
        plans = [
            run.plan_at(tokens)
            for tokens in np.linspace(phase.start_tokens, phase.end_tokens - 1, 64)
        ]
        batches = [float(plan.step_tokens) for plan in plans[:-1] or plans]
        rates = [float(plan.learning_rate) for plan in plans]
        step_tokens = steps.column("train/global_batch_tokens")
        planned = planned_tokens(run, bounds)
        consumed = _consumed_between(run, bounds)
        facts.append(
            PhaseFacts(
                name=phase.name,
                seq_length=plans[0].seq_length,
                planned_tokens=phase.end_tokens - phase.start_tokens,
                consumed_tokens=_clamped(run.consumed_tokens, phase.start_tokens, phase.end_tokens),
                num_samples=round(float(np.nansum(step_tokens / plans[0].seq_length))),
                num_steps=len(steps),
                batch_tokens=(min(batches), max(batches)),
                learning_rate=(rates[0], rates[-1]),
                planned_source_tokens={n: float(c[1] - c[0]) for n, c in planned.items()},
                consumed_source_tokens=consumed,
                epochs=_epochs_after(run, index),
                step_time_s=_percentiles(steps.column("perf/step_time_s")),
            )
        )
    return tuple(facts)


def _clamped(clock: int, start: int, end: int) -> int:
    return min(max(clock - start, 0), end - start)


def _consumed_between(run: RunRecords, bounds: Floats) -> dict[str, float]:
    clock = np.concatenate([[0.0], run.steps.column("consumed_tokens")])
    between: dict[str, float] = {}
    for name, consumed in consumed_by_source(run).items():
        ends = np.interp(bounds, clock, np.concatenate([[0.0], consumed]))
        between[name] = float(ends[1] - ends[0])
    return between


def _epochs_after(run: RunRecords, phase_index: int) -> dict[str, float]:
    """Passes over each source when the phase ended, or at the last step on record."""
    end = run.phases[phase_index].end_tokens
    reached = [row for row in run.steps.rows if row["consumed_tokens"] <= end]
    if not reached or run.consumed_tokens <= run.phases[phase_index].start_tokens:
        return {}
    found = {name: reached[-1].get(f"data/{name}/epochs") for name in run.sources}
    return {name: float(value) for name, value in found.items() if value is not None}


def _percentiles(times_s: Floats) -> tuple[float, float, float]:
    finite = times_s[np.isfinite(times_s)]
    if not len(finite):
        return (math.nan, math.nan, math.nan)
    p50, p95, p99 = (float(value) for value in np.percentile(finite, [50, 95, 99]))
    return (p50, p95, p99)
