"""Files written block by block, several at a time, each beside its name until it is whole.

A thread holds one block, and what is written does not depend on the threads. A file that carries
its name was flushed, so a conversion that was killed goes on with those that are missing.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from threading import Event

import torch

from megatron_curr.convert.weights import Weights

BLOCK_BYTES = 8 << 20
NUM_THREADS = 4  # two a file: a file system lets one write to it, while the other reads


@dataclass(frozen=True)
class Block:
    """The next bytes of a file: how many, and how to come by them."""

    num_bytes: int
    read: Callable[[], bytes | memoryview]


def bytes_block(data: bytes) -> Block:
    """These bytes."""
    return Block(len(data), lambda: data)


def weight_blocks(
    weights: Weights, name: str, rows: Sequence[tuple[int, int]], dtype: torch.dtype
) -> Iterator[Block]:
    """Half-open ranges of a weight's rows as they lie in memory, a few rows a block."""
    width = math.prod(weights.shape(name)[1:])
    at_once = max(BLOCK_BYTES // (width * weights.dtype(name).itemsize), 1)

    def read(first: int, last: int) -> memoryview:
        values = weights.read(name, first, last).to(dtype).contiguous()
        return memoryview(values.view(-1).view(torch.uint8).numpy())

    for start, end in rows:
        for first in range(start, end, at_once):
            last = min(first + at_once, end)
            yield Block((last - first) * width * dtype.itemsize, partial(read, first, last))


def write_files(
    folder: Path,
    files: Mapping[str, Sequence[Block]],
    *,
    num_threads: int = NUM_THREADS,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """Write files of these names; those that are there are kept.

    ``on_bytes`` is told of every block written, by the thread that wrote it. Room for all is taken
    before the first is filled.
    """
    stopped = Event()

    def fill(path: Path, at: int, blocks: Sequence[Block]) -> None:
        with path.open("r+b", buffering=0) as file:
            file.seek(at)
            for block in blocks:
                if stopped.is_set():
                    raise CancelledError
                left = memoryview(block.read())
                assert len(left) == block.num_bytes
                while left:
                    left = left[file.write(left) :]
                on_bytes(block.num_bytes)
            os.fsync(file.fileno())

    def finish(path: Path, at: int, blocks: Sequence[Block], first_half: Future[None]) -> None:
        beside = _beside(path)
        fill(beside, at, blocks)
        first_half.result()  # which another thread began before
        beside.rename(path)

    with ThreadPoolExecutor(num_threads) as pool:
        jobs: list[Future[None]] = []
        try:
            for name, blocks in files.items():
                if not (folder / name).is_file():
                    ends = [0, *accumulate(block.num_bytes for block in blocks)]
                    _make_room(_beside(folder / name), ends[-1])
                    half = bisect_right(ends, ends[-1] // 2) - 1
                    jobs.append(pool.submit(fill, _beside(folder / name), 0, blocks[:half]))
                    jobs.append(
                        pool.submit(finish, folder / name, ends[half], blocks[half:], jobs[-1])
                    )
            for job in jobs:
                job.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise


def _make_room(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size_bytes)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.writing")
