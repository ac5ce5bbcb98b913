"""Run a plain function on several gloo ranks: file rendezvous, no ports, no re-import.

Ranks are forked from a server that has imported torch and megatron-core once, with the CPU shim in
place, so a group of ranks starts in well under a second. The function must be importable: a name
at the top of a module.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory

PRELOAD = [
    "megatron_curr.parallel.mcore_shim",  # the shim first, then megatron-core
    "megatron_curr.models.gpt",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
]
_GRACE_S = 1.0


class RankError(Exception):
    """A rank failed, died or hung; the message holds the first failure's own traceback."""


def run_ranks(
    fn: Callable[..., None], world_size: int, *args: object, timeout_s: float = 120.0
) -> None:
    """Run ``fn(rank, *args)`` on gloo ranks of one thread each; the first failure is raised.

    Raises ``RankError``. After ``timeout_s`` every rank is killed and the error tells where each
    one stood.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            context.Process(target=_enter, args=(fn, rank, world_size, folder, timeout_s, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            all_ended = _wait_for_first_failure(ranks, timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        exit_codes = [process.exitcode for process in ranks]
        if not all_ended or any(exit_codes):
            raise RankError(_report(fn, folder, exit_codes, timeout_s, hung=not all_ended))


def _wait_for_first_failure(
    ranks: list[multiprocessing.context.ForkServerProcess], timeout_s: float
) -> bool:
    """True once all ranks ended or one failed, False when the time is up."""
    deadline = time.monotonic() + timeout_s
    alive = {process.sentinel: process for process in ranks}
    while alive:
        ended = wait(list(alive), timeout=max(deadline - time.monotonic(), 0.0))
        if not ended:
            return False
        failed = False
        for sentinel in ended:
            process = alive.pop(sentinel)
            process.join()
            failed |= process.exitcode != 0
        if failed:
            time.sleep(_GRACE_S)  # let a peer that failed at the same moment write its story
            return True
    return True


def _report(
    fn: Callable[..., None],
    folder: Path,
    exit_codes: list[int | None],
    timeout_s: float,
    *,
    hung: bool,
) -> str:
    if hung:
        stacks = [
            f"rank {rank}:\n{path.read_text()}"
            for rank in range(len(exit_codes))
            if (path := folder / f"stacks_{rank}").exists()
        ]
        return f"{fn.__qualname__} still ran after {timeout_s:g} s\n" + "\n".join(stacks)
    failures = []
    for path in folder.glob("failure_*"):
        failed_at, story = path.read_text().split("\n", 1)
        failures.append((float(failed_at), path.name.removeprefix("failure_"), story))
    if not failures:
        return f"{fn.__qualname__}: ranks ended with exit codes {exit_codes} and no traceback"
    _, rank, story = min(failures)
    return f"{fn.__qualname__} failed first on rank {rank}:\n{story}"


def _enter(
    fn: Callable[..., None],
    rank: int,
    world_size: int,
    folder: Path,
    timeout_s: float,
    args: tuple[object, ...],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        with open(folder / f"stacks_{rank}", "w") as stacks:
            faulthandler.dump_traceback_later(max(timeout_s - 2.0, timeout_s / 2), file=stacks)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout_s),
            )
            fn(rank, *args)
            faulthandler.cancel_dump_traceback_later()
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failure_{rank}").write_text(f"{time.monotonic()}\n{traceback.format_exc()}")
        raise SystemExit(1) from None
