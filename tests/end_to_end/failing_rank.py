"""A rank of a job in which ranks fail while others wait for them: ``python -m`` this."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from launch.meeting import Place, join
from launch.worker import run_rank


class ModelBroke(Exception):
    """The failure that must be told first."""


def fail(how: str, rank: int) -> None:
    """End this rank in some way; ``alike`` ends every rank, the others only rank 1."""
    if how == "alike" or (how == "raises" and rank == 1):
        raise ModelBroke("layer 7 gave up")
    if rank != 1:
        return
    if how == "exits":
        sys.exit(3)
    if how == "leaves":
        os._exit(0)
    if how == "crashes":
        faulthandler._sigsegv()  # type: ignore[attr-defined]
    os.kill(os.getpid(), signal.SIGKILL)


def main(rendezvous: str, failures: str, how: str) -> None:
    def work(place: Place) -> None:
        import torch.distributed as dist

        if how == "dies early":
            fail(how, place.rank)
            time.sleep(60)
        join(place, rendezvous)
        dist.barrier()
        fail(how, place.rank)
        dist.barrier()

    run_rank(work, failures=Path(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
