"""Running independent tasks in worker processes, so that a death is noticed and nothing is left.

The workers come from a fork server, so they inherit no thread and no lock; each tokenises on one
core. Results may come in any order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from typing import Any, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")
_TICK_S = 0.2
_WAITING_PER_WORKER = 4  # tasks handed out in advance, so that no worker waits

_counters: Any = None


class WorkerDied(Exception):
    """A worker process ended without an answer: killed from outside, or out of memory."""


def _start(counters: Any) -> None:
    """What every worker does first."""
    global _counters
    _counters = counters
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _call(function: Callable[[Task, Any], Result], task: Task) -> Result:
    return function(task, _counters)


class Workers:
    """A pool that is started at once and used by ``run``. With one worker tasks run in place.

    ``counters`` is integers that tasks add to and the parent reads, for progress.
    """

    def __init__(self, num_workers: int, *, num_counters: int, preload: Sequence[str]) -> None:
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        if num_workers == 1:
            self.counters: Any = [0] * num_counters
            return
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        self.counters = context.Array("q", num_counters)
        self._pool = ProcessPoolExecutor(
            num_workers, mp_context=context, initializer=_start, initargs=(self.counters,)
        )

    def prepare(self, function: Callable[[Task, Any], object], task: Task) -> None:
        """Let every worker do something without waiting for it, such as loading what it needs."""
        if self._pool is not None:
            with suppress(BrokenProcessPool):  # ``run`` will say so
                for _ in range(self.num_workers):
                    self._pool.submit(_call, function, task)

    def run(
        self,
        function: Callable[[Task, Any], Result],
        tasks: Sequence[Task],
        *,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Result | Exception]]:
        """(number of the task, its result or what it raised), as they finish.

        ``on_tick`` is called now and then meanwhile. Raises ``WorkerDied``.
        """
        if self._pool is None:
            yield from self._run_here(function, tasks, on_tick)
            return
        waiting: dict[Future[Result], int] = {}
        numbers = iter(range(len(tasks)))
        try:
            while True:
                for number in numbers:
                    waiting[self._pool.submit(_call, function, tasks[number])] = number
                    if len(waiting) >= self.num_workers * _WAITING_PER_WORKER:
                        break
                if not waiting:
                    return
                done, _ = wait(waiting, timeout=_TICK_S, return_when=FIRST_COMPLETED)
                on_tick()
                for future in done:
                    error = future.exception()
                    if isinstance(error, BrokenProcessPool):
                        raise error
                    if error is not None and not isinstance(error, Exception):
                        raise error
                    yield waiting.pop(future), error or future.result()
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process died (killed, or out of memory): nothing was published, and what "
                "was finished is kept. Run the same command again, with fewer --workers if the "
                "memory was short"
            ) from error

    def _run_here(
        self,
        function: Callable[[Task, Any], Result],
        tasks: Sequence[Task],
        on_tick: Callable[[], None],
    ) -> Iterator[tuple[int, Result | Exception]]:
        for number, task in enumerate(tasks):
            try:
                result: Result | Exception = function(task, _Ticking(self.counters, on_tick))
            except Exception as error:
                result = error
            on_tick()
            yield number, result

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """End at once: a task that still runs is not waited for."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)


class _Ticking:
    """Counters that tell the parent's display about every change."""

    def __init__(self, counters: list[int], on_tick: Callable[[], None]) -> None:
        self._counters = counters
        self._on_tick = on_tick

    def add(self, amounts: Sequence[int]) -> None:
        for number, amount in enumerate(amounts):
            self._counters[number] += amount
        self._on_tick()


def add_counts(counters: Any, amounts: Sequence[int]) -> None:
    """Add to the counters of a run, from wherever a task runs."""
    if isinstance(counters, _Ticking):
        counters.add(amounts)
        return
    with counters.get_lock():
        for number, amount in enumerate(amounts):
            counters[number] += amount
