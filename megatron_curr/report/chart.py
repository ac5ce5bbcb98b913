"""Charts as inline SVG: axes, areas, lines, dots, bars, and beside them the values to hover over.

Colours are CSS classes (``c0`` to ``c7``, ``rest``, ``ink``), so that one picture serves the light
and the dark page. Coordinates are CSS pixels at the width the figure is drawn for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from megatron_curr.report.values import Floats, compact, nice_ticks, significant

LABEL_HEIGHT = 14.0  # pixels between two labels at the end of lines
CHARACTER_WIDTH = 6.4  # pixels, of the label font
MOST_HOVER_POINTS = 400


@dataclass(frozen=True)
class Axis:
    """One axis: its range, how a value is written, and what it says at the end."""

    low: float
    high: float
    title: str = ""
    write: Callable[[float], str] = compact
    ticks: tuple[float, ...] | None = None
    is_log: bool = False

    def fraction(self, values: Floats) -> Floats:
        """0 at ``low``, 1 at ``high``; values outside are clipped to the range."""
        clipped = np.clip(values, self.low, self.high)
        if self.is_log:
            low, high = math.log(self.low), math.log(self.high)
            return np.asarray((np.log(clipped) - low) / (high - low), dtype=np.float64)
        return np.asarray((clipped - self.low) / (self.high - self.low), dtype=np.float64)


@dataclass(frozen=True)
class Band:
    """A named stretch of the x axis: a phase."""

    start: float
    end: float
    name: str


@dataclass(frozen=True)
class Hover:
    """What a pointer over the figure reads."""

    label: str
    colour: str
    x: Floats
    y: Floats
    unit: str = ""
    is_share: bool = False


@dataclass
class Chart:
    """A figure being drawn. Call the drawing methods back to front, then ``svg``."""

    x: Axis
    y: Axis
    title: str
    width: float
    height: float
    left: float = 52.0
    right: float = 16.0
    top: float = 26.0
    bottom: float = 34.0
    _marks: list[str] = field(default_factory=list)
    _hovers: list[Hover] = field(default_factory=list)

    def across(self, values: Floats | Sequence[float]) -> Floats:
        """Pixels from the left."""
        inner = self.width - self.left - self.right
        return self.left + inner * self.x.fraction(np.asarray(values, dtype=np.float64))

    def down(self, values: Floats | Sequence[float]) -> Floats:
        """Pixels from the top."""
        inner = self.height - self.top - self.bottom
        return self.top + inner * (1 - self.y.fraction(np.asarray(values, dtype=np.float64)))

    def bands(self, bands: Sequence[Band]) -> None:
        """Shade every second band and write its name above it where it fits."""
        floor = self.height - self.bottom
        for index, band in enumerate(bands):
            left, right = self.across([band.start, band.end])
            if right - left < 1:
                continue
            self._marks.append(
                f'<rect class="band b{index % 2}" x="{left:.1f}" y="{self.top:.1f}" '
                f'width="{right - left:.1f}" height="{floor - self.top:.1f}"/>'
            )
            if len(band.name) * CHARACTER_WIDTH + 10 < right - left:
                self._marks.append(
                    f'<text class="phase" x="{left + 5:.1f}" y="{self.top - 7:.1f}">'
                    f"{escape(band.name)}</text>"
                )
            if index:
                self._marks.append(_vertical("edge", left, self.top, floor))

    def grid(self) -> None:
        """Lines and numbers of the y axis; behind the data."""
        ticks = self.y.ticks or nice_ticks(self.y.low, self.y.high, 6, is_log=self.y.is_log)
        for value, down in zip(ticks, self.down(ticks), strict=True):
            self._marks.append(
                f'<line class="grid" x1="{self.left:.1f}" x2="{self.width - self.right:.1f}" '
                f'y1="{down:.1f}" y2="{down:.1f}"/>'
                f'<text class="tick" text-anchor="end" x="{self.left - 7:.1f}" y="{down + 4:.1f}">'
                f"{escape(self.y.write(value))}</text>"
            )

    def area(self, x: Floats, low: Floats, high: Floats, colour: str) -> None:
        """Fill between two curves over the same x."""
        if len(x) < 2:
            return
        across = np.concatenate([self.across(x), self.across(x)[::-1]])
        down = np.concatenate([self.down(high), self.down(low)[::-1]])
        self._marks.append(f'<path class="area {colour}" d="{_path(across, down)}Z"/>')

    def line(self, x: Floats, y: Floats, colour: str, *, style: str = "line") -> None:
        """A curve; NaN breaks it. ``style`` is a CSS class: line, faint, plan or edgeline."""
        for start, end in _finite_runs(x, y):
            path = _path(self.across(x[start:end]), self.down(y[start:end]))
            self._marks.append(f'<path class="{style} {colour}" d="{path}"/>')

    def steps(self, x: Floats, y: Floats, colour: str, *, style: str = "line") -> None:
        """A curve that holds each value until the next x."""
        if len(x):
            self.line(np.repeat(x, 2)[1:], np.repeat(y, 2)[:-1], colour, style=style)

    def dots(self, x: Floats, y: Floats, colour: str, *, radius: float = 2.6) -> None:
        seen = np.isfinite(y)
        for across, down in zip(self.across(x[seen]), self.down(y[seen]), strict=True):
            self._marks.append(
                f'<circle class="dot {colour}" cx="{across:.1f}" cy="{down:.1f}" r="{radius}"/>'
            )

    def bars(self, edges: Floats, heights: Floats, colour: str) -> None:
        """A histogram from its bin edges."""
        across, floor = self.across(edges), self.height - self.bottom
        for left, right, top in zip(across[:-1], across[1:], self.down(heights), strict=True):
            if floor - top > 0.2:
                self._marks.append(
                    f'<rect class="bar {colour}" x="{left + 0.5:.1f}" y="{top:.1f}" '
                    f'width="{max(right - left - 1, 0.6):.1f}" height="{floor - top:.1f}"/>'
                )

    def flag(self, x: float, label: str, kind: str, *, level: int = 0) -> None:
        """A vertical mark, with a label at its head when there is one."""
        across = float(self.across([x])[0])
        self._marks.append(_vertical(f"flag {kind}", across, self.top, self.height - self.bottom))
        if label:
            is_far = across > self.width - self.right - len(label) * CHARACTER_WIDTH
            anchor, shift = ("end", -4) if is_far else ("start", 4)
            self._marks.append(
                f'<text class="flaglabel {kind}" text-anchor="{anchor}" x="{across + shift:.1f}" '
                f'y="{self.top + 12 + level * LABEL_HEIGHT:.1f}">{escape(label)}</text>'
            )

    def end_labels(self, labels: Sequence[tuple[str, str, float]], *, after: float) -> None:
        """Name lines right of ``after``: (label, colour, last y), moved apart to be read."""
        shown = [entry for entry in labels if math.isfinite(entry[2])]
        across = float(self.across([after])[0])
        shown.sort(key=lambda entry: -entry[2])
        downs = _spread([float(self.down([y])[0]) for _, _, y in shown], self.top, self.height)
        for (label, colour, _), down in zip(shown, downs, strict=True):
            self._marks.append(
                f'<text class="end {colour}" x="{across + 7:.1f}" y="{down + 4:.1f}">'
                f"{escape(label)}</text>"
            )

    def hover(self, hover: Hover) -> None:
        """Let a pointer read this curve."""
        self._hovers.append(hover)

    def svg(self, *, follows_tokens: bool = True) -> str:
        """The finished ``<svg>`` and, for the pointer, its values as JSON."""
        floor = self.height - self.bottom
        ticks = self.x.ticks or nice_ticks(
            self.x.low, self.x.high, max(3, int((self.width - self.left) / 110))
        )
        axis = [
            f'<text class="tick" text-anchor="middle" x="{across:.1f}" y="{floor + 17:.1f}">'
            f"{escape(self.x.write(value))}</text>"
            for value, across in zip(ticks, self.across(ticks), strict=True)
        ]
        axis.append(
            f'<line class="axis" x1="{self.left:.1f}" x2="{self.width - self.right:.1f}" '
            f'y1="{floor:.1f}" y2="{floor:.1f}"/>'
        )
        if self.x.title:
            axis.append(
                f'<text class="axistitle" text-anchor="end" x="{self.width - self.right:.1f}" '
                f'y="{floor + 31:.1f}">{escape(self.x.title)}</text>'
            )
        head = (
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" style="--drawn: {self.width:g}px" '
            f'role="img" '
            f'aria-label="{escape(self.title, quote=True)}">'
        )
        values = self._hover_json() if follows_tokens and self._hovers else ""
        return head + "".join(self._marks) + "".join(axis) + "</svg>" + values

    def _hover_json(self) -> str:
        frame = [self.left, self.width - self.right, self.top, self.height - self.bottom]
        payload = {
            "frame": frame,
            "width": self.width,
            "range": [self.x.low, self.x.high],
            "series": [_hover_entry(hover) for hover in self._hovers],
        }
        text = json.dumps(payload, separators=(",", ":")).replace("<", "\\u003c")
        return f'<script type="application/json" class="hover">{text}</script>'


def _hover_entry(hover: Hover) -> dict[str, object]:
    stride = max(1, math.ceil(len(hover.x) / MOST_HOVER_POINTS))
    x, y = hover.x[::stride], hover.y[::stride]
    seen = np.isfinite(y)
    return {
        "label": hover.label,
        "colour": hover.colour,
        "unit": hover.unit,
        "share": hover.is_share,
        "x": [int(value) for value in x[seen]],
        "y": [significant(float(value), 5) for value in y[seen]],
    }


def _vertical(css_class: str, across: float, top: float, floor: float) -> str:
    return (
        f'<line class="{css_class}" x1="{across:.1f}" x2="{across:.1f}" '
        f'y1="{top:.1f}" y2="{floor:.1f}"/>'
    )


def _path(across: Floats, down: Floats) -> str:
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(across, down, strict=True)]
    if len(points) == 1:  # a lone point needs a length to show its round cap
        points.append(points[0])
    return "M" + "L".join(points)


def _finite_runs(x: Floats, y: Floats) -> list[tuple[int, int]]:
    """Half-open index ranges in which both are finite."""
    seen = np.isfinite(x) & np.isfinite(y)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _spread(downs: Sequence[float], top: float, bottom: float) -> list[float]:
    """Positions at least a label apart, in order, as near to the wanted ones as that allows."""
    placed: list[float] = []
    for down in downs:
        placed.append(max(down, placed[-1] + LABEL_HEIGHT if placed else top))
    limit = bottom
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit - 4)
        limit = placed[index] - LABEL_HEIGHT + 4
    return placed
