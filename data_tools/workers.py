"""Running independent tasks in worker processes, so that a death is noticed and nothing is left.

The workers come from a fork server, so they inherit no thread and no lock; each tokenises on one
core. Results may come in any order.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
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
_PROCESS, _TASK, _COUNTERS = range(3)  # what stands where on a desk
_NO_TASK = -1

# What workers on text load, once for all of them; what is not installed is left out.
TEXT_PRELOAD = (
    *("data_tools.unit_work", "data_tools.sampling", "pyarrow.compute", "tokenizers"),
    *("sentencepiece", "gigatoken", "awkward"),
)

_desk: Desk | None = None


def start_fork_server(preload: Sequence[str]) -> None:
    """Let the process that workers come from load their libraries, while this one goes on."""
    multiprocessing.set_forkserver_preload(list(preload))
    multiprocessing.forkserver.ensure_running()


class WorkFailed(Exception):
    """The command was right and its work could not be done; what was finished is kept."""


class WorkerDied(WorkFailed):
    """A worker process ended without an answer: killed from outside, or out of memory."""


class Desk:
    """One worker's numbers, which the parent reads: its process, its task, then its counters.

    Nobody else writes there, so there is no lock that a killed worker could take with it.
    """

    def __init__(
        self, board: Any, first: int, *, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._board, self._first, self._on_change = board, first, on_change
        board[first + _PROCESS] = os.getpid()
        self.take(_NO_TASK)

    def take(self, task_number: int) -> None:
        """Say which task is worked on."""
        self._board[self._first + _TASK] = task_number

    def add(self, amounts: Sequence[int]) -> None:
        """Add to the counters."""
        for place, amount in enumerate(amounts, start=self._first + _COUNTERS):
            self._board[place] += amount
        self._on_change()


def _start(board: Any, seats: Any, desk_size: int) -> None:
    """What every worker does first."""
    global _desk
    with seats.get_lock():
        seat = seats.value
        seats.value += 1
    _desk = Desk(board, seat * desk_size)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted too, and ends us
    os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def _call(function: Callable[[Task, Desk], Result], task: Task, number: int) -> Result:
    assert _desk is not None
    _desk.take(number)
    try:
        return function(task, _desk)
    finally:
        _desk.take(_NO_TASK)


class Workers:
    """A pool that is started at once and used by ``run``. With one worker tasks run in place.

    ``num_counters`` is how many numbers tasks add to and the parent reads, for progress.
    """

    def __init__(self, num_workers: int, *, num_counters: int, preload: Sequence[str]) -> None:
        self.num_workers = num_workers
        self._num_counters = num_counters
        self._desk_size = _COUNTERS + num_counters
        self._board: Any = [0] * self._desk_size
        self._pool: ProcessPoolExecutor | None = None
        if num_workers == 1:
            return
        start_fork_server(preload)
        context = multiprocessing.get_context("forkserver")
        self._board = context.RawArray("q", num_workers * self._desk_size)
        for seat in range(num_workers):
            self._board[seat * self._desk_size + _TASK] = _NO_TASK
        seats = context.Value("i", 0)
        self._pool = ProcessPoolExecutor(
            num_workers,
            mp_context=context,
            initializer=_start,
            initargs=(self._board, seats, self._desk_size),
        )
        self._processes = self._pool._processes  # the pool forgets them when one has died

    @property
    def counters(self) -> list[int]:
        """The sums of all workers' counters."""
        return [
            sum(self._board[_COUNTERS + number :: self._desk_size])
            for number in range(self._num_counters)
        ]

    def prepare(self, function: Callable[[Task, Desk], object], task: Task) -> None:
        """Let every worker do something without waiting for it, such as loading what it needs."""
        if self._pool is not None:
            with suppress(BrokenProcessPool):  # ``run`` will say so
                for _ in range(self.num_workers):
                    self._pool.submit(_call, function, task, _NO_TASK)

    def run(
        self,
        function: Callable[[Task, Desk], Result],
        tasks: Sequence[Task],
        *,
        name_of: Callable[[Task], str] | None = None,
        on_tick: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Result | Exception]]:
        """(number of the task, its result or what it raised), as they finish.

        ``on_tick`` is called now and then meanwhile. Raises ``WorkerDied``, which says by
        ``name_of`` what the worker was at.
        """
        if self._pool is None:
            yield from self._run_here(function, tasks, on_tick)
            return
        waiting: dict[Future[Result], int] = {}
        numbers = iter(range(len(tasks)))
        try:
            while True:
                for number in numbers:
                    future = self._pool.submit(_call, function, tasks[number], number)
                    waiting[future] = number
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
            lost = self._tasks_of_the_dead()
            names = "; ".join(name_of(tasks[number]) for number in lost) if name_of else ""
            raise WorkerDied(
                "a worker process died (killed, or out of memory)"
                f"{' while it worked on ' if names else ''}{names}: nothing was published, and "
                "what was finished is kept. Run the same command again, with fewer --workers if "
                "the memory was short"
            ) from error

    def _tasks_of_the_dead(self) -> list[int]:
        """What the workers that died were at; of all, where it cannot be told which died."""
        assert self._pool is not None
        self._pool.shutdown(wait=True)  # it terminates those that live
        dead = {p.pid for p in self._processes.values() if p.exitcode != -signal.SIGTERM}
        processes, tasks = (self._board[at :: self._desk_size] for at in (_PROCESS, _TASK))
        at_work = {p: task for p, task in zip(processes, tasks, strict=True) if task != _NO_TASK}
        return sorted(at_work[process] for process in dead or at_work if process in at_work)

    def _run_here(
        self,
        function: Callable[[Task, Desk], Result],
        tasks: Sequence[Task],
        on_tick: Callable[[], None],
    ) -> Iterator[tuple[int, Result | Exception]]:
        desk = Desk(self._board, 0, on_change=on_tick)
        for number, task in enumerate(tasks):
            try:
                result: Result | Exception = function(task, desk)
                on_tick()
            except Exception as error:
                result = error
            yield number, result

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        """End at once: a task that still runs is not waited for."""
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)
