"""What every rank runs: ``python -m launch.worker RECIPE``, started by us, torchrun or Slurm.

Rank and world size come from the environment, as torchrun sets them. Exit code 0 means complete or
stopped cleanly, 1 failed, 2 wrong input.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from megatron_curr.errors import UserError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.console import log_to_file, log_to_user
from megatron_curr.training.signals import StopSignals, die_with_parent

if TYPE_CHECKING:
    from megatron_curr.training.preflight import Prepared

log = logging.getLogger("launch.worker")  # the module itself runs as __main__


@dataclass(frozen=True)
class Place:
    """Where this rank stands among the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> Place:
        """As torchrun describes it; one rank alone where nothing does."""

        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        world_size = number("WORLD_SIZE", 1)
        return cls(
            rank=number("RANK", 0),
            world_size=world_size,
            local_rank=number("LOCAL_RANK", 0),
            local_world_size=number("LOCAL_WORLD_SIZE", world_size),
        )

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}, pid {os.getpid()} on {socket.gethostname()}"


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Train as one rank to the end and leave with its exit code."""
    options = _parse(arguments)
    signals = StopSignals()
    if options.parent is not None:
        die_with_parent(options.parent)
    signals.install()  # before the slow imports: a signal that comes meanwhile is not lost
    run_rank(lambda place: _train(options, place, signals), failures=options.failures)


def run_rank(work: Callable[[Place], None], *, failures: Path | None) -> NoReturn:
    """Do one rank's work and leave with its exit code; a failure is told before.

    torch is not imported yet: it reads its share of the cores when it is.
    """
    faulthandler.enable()
    place = Place.from_environment()
    log_to_user(place.rank)
    share = max((os.cpu_count() or 1) // place.local_world_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    # Threads that wait spin; where other programs want the same cores that makes a step several
    # times slower (measured: 15 s instead of 5 s).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.filterwarnings("ignore", module="megatron|torch.distributed")
    code = 0
    try:
        work(place)
    except Exception as error:
        code = 2 if isinstance(error, UserError) else 1
        _tell(error, place, failures)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure the other ranks may be gone: nothing collective, no waiting for threads.
    os._exit(code)


def _train(options: argparse.Namespace, place: Place, signals: StopSignals) -> None:
    from megatron_curr.training.preflight import prepare

    prepared = prepare(load_recipe(options.recipe, options.overrides), place.world_size)
    join(place, options.rendezvous)
    train_prepared(prepared, place, signals=signals, stop_at_tokens=options.stop_at_tokens)


def train_prepared(
    prepared: Prepared, place: Place, *, signals: StopSignals, stop_at_tokens: int | None = None
) -> None:
    """Train among ranks that have met already; rank 0 holds the run folder meanwhile.

    Raises what ends the run other than its end. Nothing is collective after a failure.
    """
    import torch
    import torch.distributed as dist

    from megatron_curr.training.build import build_run, say_how_it_ended
    from megatron_curr.training.loop import train

    folder = prepared.folder
    lock = folder.lock() if place.rank == 0 else None
    if lock is not None:
        folder.write_records(prepared.recipe, prepared.ledger)
    dist.barrier()
    log_to_file(folder.logs / f"rank_{place.rank}.log", also_output=place.rank != 0)
    log.info("%s, %d threads, torch %s", place, torch.get_num_threads(), torch.__version__)
    for change in prepared.changes if place.rank == 0 else ():
        log.info("changed since the last start: %s", change)
    with build_run(prepared, signals=signals, stop_at_tokens=stop_at_tokens) as run:
        train(run)
        dist.barrier()
        if lock is not None:
            say_how_it_ended(run)
            lock.release()


def join(place: Place, rendezvous: str | None) -> None:
    """Meet the other ranks: in a file when we started them, else where torchrun says."""
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(place.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    alone = place.world_size == 1 and "MASTER_ADDR" not in os.environ
    if rendezvous is None and alone:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            backend,
            init_method=rendezvous or "env://",
            rank=place.rank,
            world_size=place.world_size,
        )


def _tell(error: Exception, place: Place, failures: Path | None) -> None:
    """Say what ended this rank: to the launcher, which prints the first failure, or to the user."""
    is_expected = isinstance(error, UserError) or getattr(error, "is_plain", False)
    story = str(error) if is_expected else "".join(traceback.format_exception(error))
    log.debug("%s ended", place, exc_info=error)
    if failures is None:
        print(f"error: {story}", file=sys.stderr)
        return
    record = {"time_s": time.monotonic(), "rank": place.rank, "story": story}
    partial = failures / f".{place.rank}.partial"
    partial.write_text(json.dumps({**record, "is_expected": is_expected}), encoding="utf-8")
    partial.replace(failures / f"{place.rank}.json")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.worker", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--stop-at", dest="stop_at_tokens", type=int)
    parser.add_argument("--rendezvous", help="file:// address where local ranks meet")
    parser.add_argument("--failures", type=Path, help="folder in which a failing rank says why")
    parser.add_argument("--parent", type=int, help="process whose death ends this one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
