"""The figures of the page, each a function from a run to inline SVG."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_curr.report import facts
from megatron_curr.report.chart import CHARACTER_WIDTH, Axis, Band, Chart, Hover
from megatron_curr.report.editions import LedgerRow, ledger_rows
from megatron_curr.report.facts import SourceGroup
from megatron_curr.report.records import PhaseSpan, RunRecords, Table
from megatron_curr.report.values import (
    Floats,
    compact,
    nice_ticks,
    padded_range,
    percent,
    scientific,
    smoothed,
    thinned,
)

WIDE = (1160.0, 300.0)  # pixels, for a figure across the page
HALF = (568.0, 280.0)
THIRD = (372.0, 190.0)
MIXTURE_WINDOWS = (12, 56)  # as many as leave a window samples enough
WINDOW_SAMPLES = 96
SMOOTHING_FRAC = 0.03  # of the tokens on record
MOST_POINTS = 700
CLIPPED_TO_PERCENTILE = 99.5
MAX_END_LABEL = 14  # characters


@dataclass(frozen=True)
class View:
    """What every figure of one run shares."""

    run: RunRecords
    groups: tuple[SourceGroup, ...]
    bands: tuple[Band, ...]
    restarts: tuple[float, ...]
    editions: tuple[LedgerRow, ...]

    def tokens_axis(self) -> Axis:
        return Axis(0.0, float(self.run.schedule.total_tokens), "tokens consumed")

    def chart(
        self, y: Axis, title: str, size: tuple[float, float], *, right: float = 16.0
    ) -> Chart:
        """An empty figure over the token clock, with phases and restarts behind the data."""
        chart = Chart(self.tokens_axis(), y, title, *size, right=right)
        chart.bands(self.bands)
        chart.grid()
        for tokens in self.restarts:
            chart.flag(tokens, "", "restart")
        self.mark_editions(chart)
        return chart

    def mark_editions(self, chart: Chart, *, with_names: bool = False) -> None:
        """Mark where amendments begin, and where the run was rolled back to."""
        for row in self.editions:
            if row.mark:
                chart.flag(row.at_tokens, row.mark if with_names else "", "amendment", level=1)

    @property
    def label_room(self) -> float:
        """Pixels to the right of a figure that the names of its lines need."""
        longest = max(len(shortened(group.label)) for group in self.groups)
        return max(longest, 5) * CHARACTER_WIDTH + 16


def build_view(run: RunRecords) -> View:
    bands = tuple(
        Band(float(phase.start_tokens), float(phase.end_tokens), phase.name) for phase in run.phases
    )
    return View(run, facts.source_groups(run), bands, facts.restarts(run), ledger_rows(run))


def shortened(label: str) -> str:
    """Long names lose their middle: the sources of one family differ at the end."""
    if len(label) <= MAX_END_LABEL:
        return label
    head = MAX_END_LABEL // 2 - 1
    return f"{label[:head]}…{label[head + 1 - MAX_END_LABEL :]}"


def mixture(view: View) -> str:
    """Stacked plan; a dot on every border for what was realised in a window of steps."""
    run = view.run
    share = Axis(0.0, 1.0, write=percent, ticks=(0, 0.25, 0.5, 0.75, 1.0))
    chart = Chart(view.tokens_axis(), share, "Planned and realised mixture", *WIDE)
    chart.bands(view.bands)
    grid = facts.plan_grid(run)
    shares = facts.planned_shares(run, grid)
    low = np.zeros(len(grid))
    for group in view.groups:
        planned = np.sum([shares[name] for name in group.sources], axis=0)
        keep = _corners(grid, planned, low)
        chart.area(grid[keep], low[keep], (low + planned)[keep], group.colour)
        chart.line(grid[keep], (low + planned)[keep], group.colour, style="edgeline")
        chart.hover(Hover(f"{group.label}, plan", group.colour, grid, planned, is_share=True))
        low = low + planned
    chart.grid()
    for tokens in view.restarts:
        chart.flag(tokens, "resumed", "restart")
    view.mark_editions(chart, with_names=True)
    middle, realised = _realised_shares(view)
    low = np.zeros(len(middle))
    for group in view.groups:
        seen = realised[group.label]
        low = low + seen
        if group is not view.groups[-1]:
            chart.dots(middle, low, group.colour)
        chart.hover(Hover(f"{group.label}, realised", group.colour, middle, seen, is_share=True))
    return chart.svg()


def _corners(grid: Floats, share: Floats, low: Floats) -> NDArray[np.intp]:
    """Indices at which the stacked curve bends: a straight stretch needs only its two ends."""
    inside = np.ones(len(grid), dtype=bool)
    for curve in (low, low + share):
        slope = np.diff(curve) / np.diff(grid)
        bends = np.abs(np.diff(slope)) > 1e-12
        inside[1:-1] &= ~bends
    inside[[0, -1]] = False
    return np.flatnonzero(~inside)


def _realised_shares(view: View) -> tuple[Floats, dict[str, Floats]]:
    """Share of every group in each of some windows of whole steps, and the windows' middles."""
    run = view.run
    clock = np.concatenate([[0.0], run.steps.column("consumed_tokens")])
    num_windows = int(np.clip(run.schedule.total_samples // WINDOW_SAMPLES, *MIXTURE_WINDOWS))
    window = run.schedule.total_tokens / num_windows
    wanted = np.concatenate(
        [
            np.linspace(p.start_tokens, p.end_tokens, 1 + max(1, round(_length(p) / window)))
            for p in run.phases
        ]
    )
    edges = np.unique(np.clip(np.searchsorted(clock, wanted), 0, len(clock) - 1))
    consumed = facts.consumed_by_source(run)
    totals = {
        group.label: np.diff(
            np.sum([np.concatenate([[0.0], consumed[n]]) for n in group.sources], axis=0)[edges]
        )
        for group in view.groups
    }
    everything = np.sum(list(totals.values()), axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = {label: tokens / everything for label, tokens in totals.items()}
    return (clock[edges[1:]] + clock[edges[:-1]]) / 2, shares


def _length(phase: PhaseSpan) -> int:
    return phase.end_tokens - phase.start_tokens


def heldout_loss(view: View) -> str:
    """Loss on held-out text, one line a source."""
    table = view.run.evaluations
    curves = {group: _group_loss(view, table, group, "eval") for group in view.groups}
    low, high = padded_range(list(curves.values()))
    chart = view.chart(Axis(low, high), "Held-out loss per source", HALF, right=view.label_room)
    clock = table.column("consumed_tokens")
    for group, loss in curves.items():
        chart.line(clock, loss, group.colour)
        chart.dots(clock, loss, group.colour, radius=2.2)
        chart.hover(Hover(group.label, group.colour, clock, loss))
    chart.end_labels(_last_values(curves), after=_end(clock))
    return chart.svg()


def train_loss(view: View) -> str:
    """Loss on the training batches: all of it, and one smoothed line a source."""
    table = view.run.steps
    clock = table.column("consumed_tokens")
    width = SMOOTHING_FRAC * _end(clock)
    total = table.column(f"train/{view.run.loss}")
    curves = {g: smoothed(clock, _group_loss(view, table, g, "train"), width) for g in view.groups}
    low, high = padded_range([total, *curves.values()])
    chart = view.chart(Axis(low, high), "Training loss", HALF, right=view.label_room)
    chart.line(*thinned(clock, total, MOST_POINTS), "ink", style="faint")
    for group, loss in curves.items():
        seen = np.isfinite(loss)  # a rare source has no token in many a step
        chart.line(*thinned(clock[seen], loss[seen], MOST_POINTS), group.colour)
        chart.hover(Hover(group.label, group.colour, clock, loss))
    mean = smoothed(clock, total, width)
    chart.line(*thinned(clock, mean, MOST_POINTS), "ink")
    chart.hover(Hover("all", "ink", clock, mean))
    last = mean[-1] if len(mean) else np.nan
    chart.end_labels([*_last_values(curves), ("all", "ink", float(last))], after=_end(clock))
    return chart.svg()


def _group_loss(view: View, table: Table, group: SourceGroup, area: str) -> Floats:
    """Loss of the group: the plain mean over its sources that the row has."""
    columns = np.array(
        [table.column(f"{area}/{name}/{view.run.loss}") for name in group.sources]
    ).reshape(len(group.sources), len(table))
    seen = np.isfinite(columns)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(seen, columns, 0.0).sum(axis=0) / seen.sum(axis=0))


def _last_values(curves: dict[SourceGroup, Floats]) -> list[tuple[str, str, float]]:
    labels = []
    for group, loss in curves.items():
        finite = loss[np.isfinite(loss)]
        if len(finite):
            labels.append((shortened(group.label), group.colour, float(finite[-1])))
    return labels


def _end(clock: Floats) -> float:
    return float(clock[-1]) if len(clock) else 0.0


def learning_rate(view: View) -> str:
    return _plan_and_run(view, "Learning rate", "train/learning_rate", lambda p: p.learning_rate)


def global_batch(view: View) -> str:
    return _plan_and_run(
        view, "Global batch, tokens", "train/global_batch_tokens", lambda plan: plan.step_tokens
    )


def sequence_length(view: View) -> str:
    """Of text; for video, whose samples have several shapes, the share of each."""
    if view.run.buckets:
        return _bucket_shares(view)
    name = "train/seq_length_tokens"
    lengths = sorted({view.run.plan_at(p.start_tokens).seq_length for p in view.run.phases})
    ticks = (0.0, *(float(length) for length in lengths)) if len(lengths) <= 4 else None
    return _plan_and_run(
        view, "Sequence length, tokens", name, lambda plan: plan.seq_length, ticks=ticks
    )


def _bucket_shares(view: View) -> str:
    """Share of the tokens read lately that each shape had."""
    table = view.run.steps
    clock = table.column("consumed_tokens")
    read = {
        name: np.diff(table.column(f"data/{name}/bucket_consumed_tokens"), prepend=0.0)
        for name in view.run.buckets
    }
    everything = np.sum(list(read.values()), axis=0)
    chart = view.chart(Axis(0.0, 1.0, write=percent), "Share of tokens by shape", THIRD)
    for number, (name, tokens) in enumerate(read.items()):
        with np.errstate(invalid="ignore"):
            share = smoothed(clock, tokens / everything, SMOOTHING_FRAC * _end(clock))
        colour = f"c{number % facts.MOST_COLOURED_SOURCES}"
        chart.line(*thinned(clock, share, MOST_POINTS), colour)
        chart.hover(Hover(name, colour, clock, share, is_share=True))
    return chart.svg()


def _plan_and_run(
    view: View,
    title: str,
    name: str,
    planned_value: Callable[..., float],
    *,
    ticks: tuple[float, ...] | None = None,
) -> str:
    """The plan as a thin dashed line over the whole run, what happened as a solid one on it."""
    run = view.run
    grid = facts.plan_grid(run, 400)
    planned = np.array([float(planned_value(run.plan_at(t))) for t in grid])
    clock = run.steps.column("consumed_tokens")
    starts = np.concatenate([[0.0], clock[:-1]]) if len(clock) else clock
    seen = run.steps.column(name)
    _, high = padded_range([planned, seen], floor=0.0)
    is_rate = high < 1
    write = scientific if is_rate else compact
    chart = view.chart(Axis(0.0, high, write=write, ticks=ticks), title, THIRD)
    chart.line(grid, planned, "ink", style="plan")
    chart.steps(*thinned(starts, seen, MOST_POINTS), "accent")
    chart.hover(Hover("plan", "ink", grid, planned))
    chart.hover(Hover("run", "accent", starts, seen))
    return chart.svg()


def throughput(view: View) -> str:
    """Tokens per second, step by step and smoothed."""
    table = view.run.steps
    clock, rate = table.column("consumed_tokens"), table.column("perf/tokens_per_s")
    width = SMOOTHING_FRAC * _end(clock)
    _, high = padded_range([rate], floor=0.0)
    chart = view.chart(Axis(0.0, high), "Throughput, tokens per second", HALF)
    chart.line(*thinned(clock, rate, MOST_POINTS), "accent", style="faint")
    chart.line(*thinned(clock, smoothed(clock, rate, width), MOST_POINTS), "accent")
    chart.hover(Hover("tokens/s", "accent", clock, rate))
    return chart.svg()


def gradient_norm(view: View) -> str:
    table = view.run.steps
    clock, norm = table.column("consumed_tokens"), table.column("train/grad_norm")
    positive = norm[np.isfinite(norm) & (norm > 0)]
    low, high = (
        (float(positive.min()) * 0.9, float(positive.max()) * 1.1) if len(positive) else (0.1, 1.0)
    )
    chart = view.chart(Axis(low, high, is_log=True), "Gradient norm", HALF)
    chart.line(*thinned(clock, np.where(norm > 0, norm, np.nan), MOST_POINTS), "accent")
    chart.hover(Hover("gradient norm", "accent", clock, norm))
    return chart.svg()


def step_times(view: View) -> str:
    """Every step's time, with what interrupts training marked where it happened."""
    table = view.run.steps
    clock, times_s = table.column("consumed_tokens"), table.column("perf/step_time_s")
    finite = times_s[np.isfinite(times_s)]
    high = 1.0
    if len(finite):
        high = float(np.percentile(finite, CLIPPED_TO_PERCENTILE)) * 1.25
        opening = [times_s[i] for i in facts.first_steps(view.run) if np.isfinite(times_s[i])]
        high = max(high, min(max(opening, default=0.0), 3 * high) * 1.05)
    y = Axis(0.0, high, write=lambda value: f"{compact(value)} s")
    chart = view.chart(y, "Time of every step", (WIDE[0], 240.0))
    for tokens in view.run.checkpoints.column("consumed_tokens"):
        chart.flag(float(tokens), "", "checkpoint")
    for tokens in view.restarts:
        chart.flag(tokens, "resumed", "restart")
    chart.line(*thinned(clock, times_s, 2 * MOST_POINTS), "accent", style="thin")
    if len(clock) <= MOST_POINTS:
        chart.dots(clock, times_s, "accent", radius=1.7)
    chart.hover(Hover("step time", "accent", clock, times_s, unit=" s"))
    return chart.svg()


def step_time_spread(view: View) -> str:
    """Histogram of each step against its neighbours of the same shape."""
    relative = facts.relative_step_times(view.run)
    opening = facts.first_steps(view.run)
    relative = np.array([v for i, v in enumerate(relative) if i not in opening and np.isfinite(v)])
    low, high = 0.8, 1.4
    if len(relative):
        low = min(low, float(np.percentile(relative, 1)))
        high = max(high, min(float(np.percentile(relative, 99)) * 1.05, 3.0))
    edges = np.linspace(low, high, 49)
    counts = np.histogram(np.clip(relative, low, high), edges)[0].astype(np.float64)
    tallest = max(float(counts.max()), 1.0) * 1.4  # room for the labels
    y_ticks = tuple(t for t in nice_ticks(0, tallest / 1.35, 4) if float(t).is_integer())
    x = Axis(low, high, "time per token / median of its neighbours", lambda v: f"{v:.3g}×")
    chart = Chart(x, Axis(0.0, tallest, ticks=y_ticks), "Spread of step times, steps", *HALF)
    chart.grid()
    chart.bars(edges, counts, "accent")
    levels = (
        [] if not len(relative) else [(p, float(np.percentile(relative, p))) for p in (50, 95, 99)]
    )
    for level, (percentile, value) in enumerate(levels):
        chart.flag(min(value, high), f"p{percentile}  {value:.2f}×", "mark", level=level)
    return chart.svg(follows_tokens=False)
