"""Batches of a step, prepared ahead by one background thread.

A loader keeps no position of its own. ``take(plan)`` gives the batches of the plan it is handed;
the thread only guesses that the next plan is the schedule's next step. A wrong guess (a resume, an
amendment) costs the prefetched work and nothing else.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

from megatron_curr.curriculum.schedule import Schedule, StepPlan

AnyBatch = TypeVar("AnyBatch")

PREFETCHED_STEPS = 2


class AheadLoader(Generic[AnyBatch]):
    """Gives what ``read`` makes of each plan; a context manager, as its thread wants closing."""

    def __init__(
        self,
        read: Callable[[StepPlan], list[AnyBatch]],
        schedule: Schedule,
        *,
        prefetched_steps: int = PREFETCHED_STEPS,
    ) -> None:
        self.last_wait_s = 0.0  # how long the last ``take`` waited for its data

        def following(plan: StepPlan) -> StepPlan | None:
            clock = plan.next_consumed_tokens
            on_edge = clock < schedule.total_tokens and schedule.step_start(clock) == clock
            return schedule.at(clock) if on_edge else None

        self._ahead = _ReadAhead(read, following, max_steps=prefetched_steps)
        # Also at interpreter exit, so that a loader nobody closed does not hang the process.
        self._finalizer = weakref.finalize(self, self._ahead.close)

    def take(self, plan: StepPlan) -> list[AnyBatch]:
        """This rank's micro-batches of a step, in order. Raises what reading them raised."""
        started_at = time.monotonic()
        batches = self._ahead.take(plan)
        self.last_wait_s = time.monotonic() - started_at
        return batches

    def close(self) -> None:
        """Stop the thread and drop what it prepared; more than once is fine."""
        self._finalizer()

    def __enter__(self) -> AheadLoader[AnyBatch]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _ReadAhead(Generic[AnyBatch]):
    """One thread that reads the step it is told to, then the following ones, a few ahead."""

    def __init__(
        self,
        read: Callable[[StepPlan], list[AnyBatch]],
        following: Callable[[StepPlan], StepPlan | None],
        *,
        max_steps: int,
    ) -> None:
        self._read = read
        self._following = following
        self._max_steps = max_steps
        self._changed = threading.Condition()
        # In the order of the steps; an exception stands for the batches it kept from being read.
        self._ready: deque[tuple[StepPlan, list[AnyBatch] | BaseException]] = deque()
        self._next: StepPlan | None = None  # what the thread reads now, or will when there is room
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
        self._thread.start()

    def take(self, plan: StepPlan) -> list[AnyBatch]:
        with self._changed:
            expected = self._ready[0][0] if self._ready else self._next
            if expected != plan:
                self._ready.clear()
                self._next = plan
                self._changed.notify_all()
            while not self._ready:
                if self._closed:
                    raise RuntimeError("the loader is closed")
                self._changed.wait()
            found = self._ready.popleft()[1]
            self._changed.notify_all()
        if isinstance(found, BaseException):
            raise found
        return found

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (
                    self._next is None or len(self._ready) >= self._max_steps
                ):
                    self._changed.wait()
                if self._closed:
                    return
                plan = self._next
            assert plan is not None
            found: list[AnyBatch] | BaseException
            try:
                found, next_plan = self._read(plan), self._following(plan)
            except BaseException as error:  # for the thread that takes this step, not for this one
                found, next_plan = error, None
            with self._changed:
                if self._next is plan:  # else another plan was asked for meanwhile
                    self._ready.append((plan, found))
                    self._next = next_plan
                    self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()
