"""Ends a rank that hangs, or whose incarnation is stale, and says where it stood.

A thread looks twice a second at what the main thread does. It needs the interpreter's lock, so a
timer in C stands behind it: were the thread kept from running, the timer writes the stacks and ends
the process. A rank that is stopped can do neither; the others say that it was silent.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from statistics import median
from types import FrameType

from megatron_curr.incarnation.fence import ALIVE_EVERY_S, Fenced, show_life
from megatron_curr.training.life import Life
from megatron_curr.training.signals import StopSignals

log = logging.getLogger(__name__)

_POLL_S = 0.5
_STEPS_NEEDED = 5
_OTHER_STAGES = 10  # building, saving, evaluating may take this many times the shortest limit
_STUCK_AFTER_SIGNAL_S = 3.0  # Slurm's KillWait, which ends all words, may be as short as that
_GRACE_S = 3.0  # for every rank to write its stacks before the first one goes
_WAITS_IN = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")


class Watchdog:
    """Watches one rank; start it once the rank's log is open."""

    def __init__(
        self,
        life: Life,
        log_path: Path,
        *,
        signals: StopSignals,
        step_multiple: float,
        least_s: float,
    ) -> None:
        """A step may take ``step_multiple`` times the median of the last ones, or ``least_s``."""
        self._life = life
        self._stacks = log_path.open("a", encoding="utf-8")
        self._signals = signals
        self._step_multiple = step_multiple
        self._least_s = least_s
        self._main = threading.main_thread().ident
        self._alive_s = 0.0
        self._told_stuck = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer; the rank is about to end by itself."""
        self._stopped.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self._stacks.close()

    def limit_s(self) -> float:
        """How long what the rank does now may take."""
        if self._life.stage != "compute":
            return _OTHER_STAGES * self._least_s
        steps_s = list(self._life.steps_s)
        if len(steps_s) < _STEPS_NEEDED:
            return _OTHER_STAGES * self._least_s
        return max(self._step_multiple * median(steps_s), self._least_s)

    def _run(self) -> None:
        while not self._stopped.wait(_POLL_S):
            faulthandler.dump_traceback_later(
                _OTHER_STAGES * self._least_s + self.limit_s(), exit=True, file=self._stacks
            )
            try:
                self._look()
            except Fenced as error:
                self._life.end("fenced", str(error))
                self._leave(str(error), grace_s=0.0)
            except Exception as error:  # a disk that does not answer is not the run's end
                log.debug("watchdog: %r", error)

    def _look(self) -> None:
        life, now_s = self._life, time.monotonic()
        if now_s - self._alive_s > ALIVE_EVERY_S:
            self._alive_s = now_s
            if life.is_first_on_node:
                life.pen.check()
            if life.rank == 0:
                show_life(life.incarnation)
        spent_s, limit_s = now_s - life.stage_began_s, self.limit_s()
        if spent_s > limit_s:
            where, is_waiting = self._where()
            detail = (
                f"rank {life.rank} on {life.node}: {life.stage} at step {life.step} takes longer "
                f"than {limit_s:.3g} s; it stands in {where}"
            )
            life.end("hang", detail, is_echo=is_waiting)
            self._write_stacks()
            self._leave(detail, grace_s=_GRACE_S)
        self._signals.look()
        received_s = self._signals.received_at_s
        if received_s is not None and not self._told_stuck:
            since_s = now_s - max(received_s, life.stage_began_s)
            if since_s > _STUCK_AFTER_SIGNAL_S and life.stage == "compute":
                self._told_stuck = True  # provisional: a clean end still writes over it
                where, _ = self._where()
                life.end(
                    "lost-rank",
                    f"a signal asked for the end, but the step did not come to its own; rank "
                    f"{life.rank} on {life.node} stands in {where}",
                    is_echo=True,
                )
                self._write_stacks()

    def _where(self) -> tuple[str, bool]:
        """The innermost place of the main thread that tells something; whether it waits there."""
        frame: FrameType | None = sys._current_frames().get(self._main or 0)
        if frame is None:
            return "no Python code", False
        stack = traceback.extract_stack(frame)
        is_waiting = any(part in stack[-1].filename for part in _WAITS_IN)
        ours = [entry for entry in stack if "megatron_curr" in entry.filename] or stack
        places = [f"{Path(e.filename).name}:{e.lineno} {e.name}" for e in (ours[-1], stack[-1])]
        return " > ".join(dict.fromkeys(places)), is_waiting

    def _write_stacks(self) -> None:
        self._stacks.write(f"\nstacks of rank {self._life.rank} on {self._life.node}:\n")
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)

    def _leave(self, why: str, *, grace_s: float) -> None:
        log.error("%s", why)
        time.sleep(grace_s)
        logging.shutdown()
        os._exit(1)
