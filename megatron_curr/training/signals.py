"""Signals that ask a run to save and end: a handler sets a flag, the loop looks at it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from types import FrameType

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


def is_left_to_us(number: int) -> bool:
    """Whether we may answer a signal: ``nohup`` lets a run live on when its terminal is closed."""
    return number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN


class StopSignals:
    """Remembers the first stop signal; does nothing else, so it is safe at any instant.

    Slurm may warn 30 s and more before the time it was told, and signals arrive twice (through the
    step and through launchers): the run saves at once on the first, and the others change nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.received_at_s: float | None = None  # monotonic
        self._wakeup: int | None = None

    def install(self) -> None:
        """Take over SIGTERM (Slurm's end), SIGUSR1 (its warning), Ctrl-C and a closed terminal."""
        # A handler waits for the main thread to come back from C; the pipe is written at once.
        self._wakeup, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)
        for number in filter(is_left_to_us, STOP_SIGNALS):
            signal.signal(number, self._remember)

    def look(self) -> None:
        """From another thread: notice a signal that the main thread has not come to yet."""
        if self._wakeup is not None:
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self._wakeup, 64):
                    if number in STOP_SIGNALS:
                        self._remember(number, None)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self.received_at_s = signal.Signals(number), time.monotonic()


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when ``parent``, which started it, dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the request
        os._exit(1)
