"""Claims and endings, made by hand and by real processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_curr.incarnation.fence import claim_run
from megatron_curr.incarnation.record import Claim, Ending, Incarnation

SUBMITTED_S, LAUNCHED_S = 1000.0, 1060.0


def a_claim(number: int, **changes: object) -> Claim:
    values = {
        "incarnation": number,
        "chain": "chain",
        "host": "node0",
        "pid": os.getpid(),
        "num_ranks": 4,
        "job_id": "4711",
        "submitted_at_s": SUBMITTED_S,
        "launched_at_s": LAUNCHED_S,
        "started_at_s": LAUNCHED_S + 1,
        "claimed_at_s": LAUNCHED_S + 6,
    }
    return Claim(**{**values, **changes})  # type: ignore[arg-type]


def claimed(run: Path, **changes: object) -> Incarnation:
    """The next incarnation of a run."""
    return claim_run(run, lambda number: a_claim(number, **changes))


def an_ending(rank: int, cause: str, **changes: object) -> Ending:
    values = {
        "rank": rank,
        "node": f"node{rank // 2}",
        "at_s": LAUNCHED_S + 100 + rank,
        "cause": cause,
        "detail": f"rank {rank}: {cause}",
        "step": 7,
    }
    return Ending(**{**values, **changes})  # type: ignore[arg-type]


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A child that works and then lives until it is killed."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(tell, b"x")
            signal.pause()
        finally:
            os._exit(1)
    os.close(tell)
    try:
        os.read(told, 1)
        yield child
    finally:
        os.close(told)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
