"""How far a long read has come: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from megatron_curr.units import format_count, format_duration

_LINE_EVERY_S = 10.0


class ReadProgress:
    """Shows bytes read, tokens written and rows rejected, on standard error."""

    def __init__(self, title: str, total_bytes: int, *, show: bool = True) -> None:
        self.title = title
        self.total_bytes = max(total_bytes, 1)
        self.read_bytes = self.tokens = self.rejects = 0
        self._show = show
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._started_at = self._last_line_at = time.monotonic()
        self._noted_at = 0.0

    def advance(self, *, num_bytes: int = 0, tokens: int = 0, rejects: int = 0) -> None:
        """Add to the counts and show them when it is time."""
        self.show(self.read_bytes + num_bytes, self.tokens + tokens, self.rejects + rejects)

    def show(self, num_bytes: int, tokens: int, rejects: int) -> None:
        """Take the counts so far and show them when it is time."""
        self.read_bytes, self.tokens, self.rejects = num_bytes, tokens, rejects
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=self.read_bytes,
                total=self.total_bytes,
                description=self.status(),
            )
        elif self._show and time.monotonic() - self._last_line_at > _LINE_EVERY_S:
            self._last_line_at = time.monotonic()
            done_frac = min(self.read_bytes / self.total_bytes, 1)
            told = f"{self.status()}, {done_frac:.0%} done"
            if done_frac > 0.001:
                left_s = self.elapsed_s * (1 - done_frac) / done_frac
                told += f", {format_duration(left_s)} left"
            self._console.print(told, highlight=False)

    def note(self, text: str, *, every_s: float = 0.0) -> None:
        """Say something once, or at most once in a while."""
        if self._show and time.monotonic() - self._noted_at >= every_s:
            self._noted_at = time.monotonic()
            (self._bar.console if self._bar else self._console).print(text, highlight=False)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._started_at

    def status(self) -> str:
        """Speed so far, and what was rejected."""
        elapsed_s = max(self.elapsed_s, 1e-3)
        return (
            f"{self.title}: {self.read_bytes / elapsed_s / 1e6:.1f} MB/s, "
            f"{format_count(int(self.tokens / elapsed_s))} tokens/s, {self.rejects:,} rejected"
        )

    def __enter__(self) -> ReadProgress:
        if self._show and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task(self.status(), total=self.total_bytes)
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
