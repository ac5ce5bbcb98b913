"""TensorBoard and W&B from the trainer's side: processes that are started and looked after.

Whatever they do, training goes on: they read ``metrics.jsonl`` (``follow_metrics.py``), and the
trainer reads only what they say of themselves. One that ends is started again after a while and
catches up from the file.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_curr.training import follow_metrics
from megatron_curr.training.signals import STOP_SIGNALS

log = logging.getLogger(__name__)

_NAMES = {"tensorboard": "TensorBoard", "wandb": "W&B"}
_LOOK_EVERY_S = 1.0
_AGAIN_AFTER_S = 60.0  # twice as long each time
_READY_WITHIN_S = 120.0
_END_WITHIN_S = 30.0  # at the end of a run


class Logger:
    """One logger's process. No method raises for what it does or does not do."""

    def __init__(self, kind: str, arguments: Sequence[str], logs: Path) -> None:
        """Starts it; its own output goes to ``logs/KIND.log``."""
        self._kind, self._name, self._logs = kind, _NAMES[kind], logs
        self._command = [sys.executable, "-m", follow_metrics.__name__, kind, *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._told = b""
        self._is_ready = self._has_warned = False
        self._looked_s = self._started_s = 0.0
        self._again_after_s = _AGAIN_AFTER_S
        self._start()

    def _start(self) -> None:
        self._started_s, self._is_ready, self._told = time.monotonic(), False, b""
        # Slurm sends its signals to every process of a step; this one has to send the last rows.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            with (self._logs / f"{self._kind}.log").open("ab") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    start_new_session=True,
                )
            assert self._process.stdout is not None
            os.set_blocking(self._process.stdout.fileno(), False)
        except OSError as error:
            self._process = None
            self._warn(str(error))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def look_after(self) -> None:
        """Once a second: hear what it says; start it again a while after it has ended."""
        now_s = time.monotonic()
        if now_s < self._looked_s + _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        self._listen()
        if self._process is None or self._process.poll() is not None:
            self._warn("it has ended")
            if now_s > self._started_s + self._again_after_s:
                self._again_after_s *= 2
                self._start()
        elif not self._is_ready and now_s > self._started_s + _READY_WITHIN_S:
            self._warn(f"it is not ready after {_READY_WITHIN_S:.0f} s")

    def _listen(self) -> None:
        if self._process is None or self._process.stdout is None:
            return
        self._told += self._process.stdout.read() or b""
        *lines, self._told = self._told.split(b"\n")
        for line in lines:
            try:
                told = json.loads(line)
            except ValueError:  # a library that prints
                continue
            if "failed" in told:
                self._warn(told["failed"])
            elif "ready" in told:
                self._is_ready = True
                if told["ready"] or self._has_warned:
                    log.info("%s takes rows %s", self._name, told["ready"] or "again")
                self._has_warned, self._again_after_s = False, _AGAIN_AFTER_S

    def _warn(self, reason: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            log.warning(
                "%s takes no rows (%s); training goes on, and they are sent from metrics.jsonl "
                "when it does or by the next start; more in %s",
                self._name,
                reason.rstrip("."),
                self._logs / f"{self._kind}.log",
            )

    def end(self) -> None:
        """Let it send what is in the file, and end."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    def wait(self) -> None:
        """Until it has ended; it is not waited for longer than half a minute."""
        if self._process is None:
            return
        try:
            self._process.wait(_END_WITHIN_S)
            self._listen()
            if self._process.returncode:
                self._warn("it has ended")
        except subprocess.TimeoutExpired:
            self._listen()
            self._warn(f"it did not end within {_END_WITHIN_S:.0f} s")
            self._process.kill()
            self._process.wait()
