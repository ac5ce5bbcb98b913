"""Context-parallel attention by every exchange beside full attention on one rank.

    python -m benchmarks.context_attention                        # up to 16k, about 3 minutes
    python -m benchmarks.context_attention --max-length 65536     # about 20 minutes on two cores

One forward and backward pass of causal attention over one sequence, on gloo ranks of one thread.

* Time is the slowest rank's, the better of two passes (one pass above 16k). More ranks than cores
  take turns, so four ranks on two cores cannot be faster than two.
* Memory is the growth of the process's resident high-water mark over a pass (VmHWM, reset through
  /proc/self/clear_refs), the largest of all ranks: inputs, outputs, gradients, temporaries of the
  kernels and buffers of gloo all count. malloc is told to map anything above 64 KiB by itself, so
  what is freed leaves at once. A ring of two needs a buffer for blocks and one for gradients less
  than a longer one: from 2 to 4 ranks the peak falls by less than half, from there on as 1 / C.
* Bytes are counted where torch.distributed is called: point-to-point sends as they are, a
  collective by what leaves a rank whatever the algorithm, (C - 1) parts of a gather or a
  reduce-scatter and (C - 1) / C of an all-to-all.

Exit code 1 when bytes differ from the formula, or when the ring's memory does not fall as 1 / C.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.multiprocessing import spawn

from megatron_curr.parallel.context_attention import attention
from megatron_curr.parallel.context_exchange import (
    ContextExchange,
    build_exchange,
    build_hierarchical_groups,
)

HEADS, GROUPS, HEAD_DIM = 8, 4, 32
SHORTEST, LONGEST_BY_DEFAULT = 4096, 16384
CONTEXT_SIZES = (2, 4, 8)
MEMORY_SLACK, SHORT_RING_SLACK = 1.15, 1.35  # over 1 / C; the latter where two ranks become more
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Row:
    """One exchange at one length: seconds and bytes, of the rank that has most."""

    exchange: str
    cp_size: int
    seq_length: int
    time_s: float
    peak_bytes: int
    sent_bytes: int
    formula_bytes: int


def formula_bytes(exchange: str, *, cp_size: int, seq_length: int, element_size: int) -> int:
    """What one rank sends in a forward and a backward pass.

    With K the bytes of its keys and values and Q those of its queries: blocks travel or are
    gathered twice and their gradients, in fp32, once; an all-to-all over A ranks carries queries,
    keys, values and the output, and all their gradients.
    """
    elements = seq_length // cp_size * HEAD_DIM
    keys_values, queries = 2 * GROUPS * elements, HEADS * elements
    all_to_all_size = {"a2a": cp_size, "a2a+p2p": cp_size // 2}.get(exchange, 1)
    blocks_size = cp_size // all_to_all_size
    blocks = (blocks_size - 1) * keys_values * (2 * element_size + 4)
    heads = 2 * element_size * (2 * queries + keys_values) // all_to_all_size
    return blocks + heads * (all_to_all_size - 1)


class Traffic:
    """Bytes that leave this rank while ``counted`` is open."""

    def __init__(self) -> None:
        self.sent_bytes = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        names = (
            "batch_isend_irecv",
            "all_gather_into_tensor",
            "reduce_scatter_tensor",
            "all_to_all_single",
        )
        originals = {name: getattr(dist, name) for name in names}
        for name, original in originals.items():
            setattr(dist, name, self._counting(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(dist, name, original)

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "batch_isend_irecv":
                sends = [op.tensor.nbytes for op in args[0] if op.op is dist.isend]
                self.sent_bytes += sum(sends)
            else:
                size, given = kwargs["group"].size(), args[1].nbytes
                one_part = given if name == "all_gather_into_tensor" else given // size
                self.sent_bytes += (size - 1) * one_part
            return original(*args, **kwargs)

        return call


def resident_bytes(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """By how much the resident memory rose while ``work`` ran."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident_bytes("VmRSS")
    work()
    return resident_bytes("VmHWM") - before


def one_pass(seq_length: int, cp_size: int, exchange: ContextExchange | None) -> None:
    """Inputs are made here, so that they count as memory."""

    def part(heads: int) -> Tensor:
        return torch.randn(seq_length // cp_size, 1, heads, HEAD_DIM)

    q, k, v = (part(heads).requires_grad_() for heads in (HEADS, GROUPS, GROUPS))
    out = attention(q, k, v, softmax_scale=HEAD_DIM**-0.5, exchange=exchange)
    out.backward(torch.ones_like(out))


def exchanges(cp_size: int) -> dict[str, ContextExchange | None]:
    """Every exchange that a context axis of this size has."""
    if cp_size == 1:
        return {"one rank": None}
    world = dist.group.WORLD
    kinds = ("p2p", "all_gather", "a2a") if GROUPS % cp_size == 0 else ("p2p", "all_gather")
    every = {kind: build_exchange(kind, world) for kind in kinds}
    if cp_size >= 4:
        levels = build_hierarchical_groups(world, (cp_size // 2, 2))
        every["a2a+p2p"] = build_exchange("a2a+p2p", world, hierarchical_groups=levels)
    return every


def measure(name: str, exchange: ContextExchange | None, seq_length: int) -> Row:
    """One row; collective."""
    cp_size = dist.get_world_size()
    times_s, traffic = [], Traffic()

    def timed() -> None:
        dist.barrier()
        start_s = time.perf_counter()
        one_pass(seq_length, cp_size, exchange)
        times_s.append(time.perf_counter() - start_s)

    with traffic.counted():
        peak_bytes = peak_growth_bytes(timed)
    for _ in range(1 if seq_length <= LONGEST_BY_DEFAULT else 0):
        timed()
    slowest = torch.tensor([*times_s, peak_bytes, traffic.sent_bytes], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    *times, peak, sent = slowest.tolist()
    formula = formula_bytes(name, cp_size=cp_size, seq_length=seq_length, element_size=4)
    return Row(name, cp_size, seq_length, min(times), int(peak), int(sent), formula)


def rank_main(rank: int, cp_size: int, folder: str, lengths: list[int]) -> None:
    """One rank of a context axis: every exchange at every length."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store_{cp_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=cp_size)
    rows = []
    every = exchanges(cp_size)
    for name, exchange in every.items():
        one_pass(1024, cp_size, exchange)  # what is made once is made now
        for seq_length in lengths:
            rows.append(asdict(measure(name, exchange, seq_length)))
            if rank == 0:
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if rank == 0:
        Path(folder, f"rows_{cp_size}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def run(lengths: list[int], context_sizes: tuple[int, ...]) -> list[Row]:
    """All rows, one rank's first."""
    # Read by malloc when a process starts: large blocks are mapped, and unmapped when freed.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = "65536"
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for cp_size in (1, *context_sizes):
            spawn(rank_main, (cp_size, folder, lengths), nprocs=cp_size)
            found = json.loads(Path(folder, f"rows_{cp_size}.json").read_text())
            rows += [Row(**row) for row in found]
    return rows


def show(rows: list[Row], console: Console) -> None:
    """The table, a length at a time."""
    table = Table(
        title=f"Causal, {HEADS} query heads, {GROUPS} key/value heads of {HEAD_DIM}, fp32"
    )
    for heading in ("tokens", "ranks", "exchange", "time s", "peak MiB", "x C / one rank's"):
        table.add_column(heading, justify="left" if heading == "exchange" else "right")
    table.add_column("sent MiB", justify="right")
    table.add_column("formula MiB", justify="right")
    alone = {row.seq_length: row for row in rows if row.cp_size == 1}
    for row in sorted(rows, key=lambda row: (row.seq_length, row.cp_size)):
        share = row.peak_bytes * row.cp_size / alone[row.seq_length].peak_bytes
        table.add_row(
            f"{row.seq_length:,}",
            str(row.cp_size),
            row.exchange,
            f"{row.time_s:.2f}",
            f"{row.peak_bytes / MIB:.1f}",
            f"{share:.2f}",
            f"{row.sent_bytes / MIB:.2f}",
            f"{row.formula_bytes / MIB:.2f}",
        )
    console.print(table)


def failures(rows: list[Row]) -> list[str]:
    """What the numbers must show and do not."""
    found = [
        f"{row.exchange} on {row.cp_size} ranks, {row.seq_length} tokens: sent {row.sent_bytes} "
        f"bytes, the formula says {row.formula_bytes}"
        for row in rows
        if row.sent_bytes != row.formula_bytes
    ]
    longest = max(row.seq_length for row in rows)
    ring = [row for row in rows if row.exchange == "p2p" and row.seq_length == longest]
    for smaller, larger in pairwise(sorted(ring, key=lambda row: row.cp_size)):
        slack = MEMORY_SLACK if smaller.cp_size > 2 else SHORT_RING_SLACK
        share = smaller.cp_size / larger.cp_size
        if larger.peak_bytes > slack * share * smaller.peak_bytes:
            found.append(
                f"ring, {longest} tokens: peak of {larger.peak_bytes} bytes on {larger.cp_size} "
                f"ranks is over {slack} x {share:g} of {smaller.peak_bytes} on {smaller.cp_size}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--max-length", type=int, default=LONGEST_BY_DEFAULT)
    parser.add_argument("--min-length", type=int, default=SHORTEST)
    parser.add_argument("--ranks", type=int, nargs="+", default=list(CONTEXT_SIZES))
    options = parser.parse_args()
    lengths = [options.min_length]
    while lengths[-1] * 2 <= options.max_length:
        lengths.append(lengths[-1] * 2)
    rows = run(lengths, tuple(options.ranks))
    console = Console(width=110)
    show(rows, console)
    for failure in (found := failures(rows)):
        console.print(f"MISSED: {failure}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
