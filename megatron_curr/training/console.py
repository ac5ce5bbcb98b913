"""What a person sees of a run: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from megatron_curr.units import format_count, format_duration

log = logging.getLogger(__name__)

LINE_EVERY_S = 5.0
_TERMINAL = Console(stderr=True)


class Narrator:
    """Tells the user how far the run is; only rank 0 speaks."""

    def __init__(self, total_tokens: int, *, speaks: bool) -> None:
        self.total_tokens = total_tokens
        self._speaks = speaks
        self._began_s: float | None = None
        self._began_tokens = 0
        self._line_s = 0.0
        self._phase = ""
        self._bar = _progress_bar() if speaks and _TERMINAL.is_terminal else None

    def step(
        self,
        *,
        step: int,
        consumed_tokens: int,
        phase: str,
        loss: float | None,
        tokens_per_s: float,
    ) -> None:
        """One step is over; ``consumed_tokens`` is the clock after it, ``loss`` None of nothing."""
        if not self._speaks:
            return
        now_s = time.monotonic()
        if self._began_s is None:
            self._began_s, self._began_tokens = now_s, consumed_tokens
            if self._bar is not None:
                self._bar.add_task("", total=self.total_tokens)
                with contextlib.suppress(OSError):  # the terminal was closed
                    self._bar.start()
        text = (
            f"{phase}  {format_count(consumed_tokens)} of {format_count(self.total_tokens)} tokens"
            f"  loss {spell_loss(loss)}  {format_count(round(tokens_per_s))} tokens/s"
            f"{self._time_left(now_s - self._began_s, consumed_tokens)}"
        )
        if self._bar is not None:
            (task,) = self._bar.task_ids
            with contextlib.suppress(OSError):
                self._bar.update(task, completed=consumed_tokens, description=text)
        is_news = phase != self._phase or consumed_tokens >= self.total_tokens
        if is_news or now_s - self._line_s >= LINE_EVERY_S:
            self._phase, self._line_s = phase, now_s
            log.info("step %d  %s", step, text, extra={"is_progress": True})

    def _time_left(self, elapsed_s: float, consumed_tokens: int) -> str:
        done, left = consumed_tokens - self._began_tokens, self.total_tokens - consumed_tokens
        return f"  {format_duration(elapsed_s * left / done)} left" if done and left else ""

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None and self._began_s is not None:
            with contextlib.suppress(OSError):
                self._bar.stop()


def spell_loss(loss: float | None) -> str:
    """A loss as a person reads it; None is that of nothing."""
    return "none (nothing counts)" if loss is None else f"{loss:.4f}"


def log_to_user(rank: int) -> None:
    """Send log lines to the user; only rank 0 speaks."""
    if rank == 0:
        handler = _UserHandler()
        handler.setLevel(logging.INFO)
        _add(handler)


def log_to_file(path: Path, *, also_output: bool) -> None:
    """Append log lines to ``path``; with ``also_output`` whatever is printed goes there, too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    _add(file)
    if also_output:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.stream.fileno(), stream.fileno())


def _add(handler: logging.Handler) -> None:
    logging.raiseExceptions = False  # a log line that cannot be written is no reason to stop
    for name in ("megatron_curr", "launch"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    logging.getLogger().addHandler(handler)


class _UserHandler(logging.Handler):
    """Prints above the bar on a terminal; progress lines only where there is no bar."""

    def emit(self, record: logging.LogRecord) -> None:
        is_progress = getattr(record, "is_progress", False)
        with contextlib.suppress(OSError):  # the terminal was closed
            if not _TERMINAL.is_terminal:
                print(self.format(record), file=sys.stderr, flush=True)
            elif not is_progress:
                _TERMINAL.print(self.format(record), markup=False, highlight=False)


def _progress_bar() -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TextColumn("{task.description}"),
        console=_TERMINAL,
        transient=True,
    )
