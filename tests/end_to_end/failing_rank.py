"""A rank of a job in which rank 1 fails while rank 0 waits for it: ``python -m`` this."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.meeting import Place, join
from launch.worker import run_rank


class ModelBroke(Exception):
    """The failure that must be told first."""


def main(rendezvous: str, failures: str) -> None:
    def work(place: Place) -> None:
        import torch.distributed as dist

        join(place, rendezvous)
        dist.barrier()
        if place.rank == 1:
            raise ModelBroke("layer 7 gave up")
        dist.barrier()

    run_rank(work, failures=Path(failures))


if __name__ == "__main__":
    main(*sys.argv[1:])
