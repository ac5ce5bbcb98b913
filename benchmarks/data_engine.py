"""Our sample order and shard reader beside megatron-core's GPTDataset and BlendedDataset.

    python -m benchmarks.data_engine            # about 3 minutes, 300 MB of disk in a temporary
    folder

One run, the same shards for both. Start-up is measured in fresh processes, from their first
instruction to the first sample, imports included; reads are interleaved round by round, and medians
are compared. Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.blended_shards import (
    HUGE_SHARDS,
    SEQ_LENGTH,
    SHARD_TOKENS,
    SHARDS,
    core_blend,
    core_replayed,
    write_corpora,
)
from megatron_curr.curriculum.schedule import Schedule, build_schedule
from megatron_curr.data.order import SampleOrder
from megatron_curr.data.shards import ShardSet, open_shards
from megatron_curr.data.windows import cut_windows
from megatron_curr.recipe.phases import Curriculum
from megatron_curr.recipe.schema import Source

DRAWN_BEFORE, DRAWN_AFTER = 6_000, 2_000
OLD_WEIGHTS = {"few": 0.2, "many": 0.8}
NEW_WEIGHTS = {"few": 0.4, "many": 0.6}

START_S, START_MB, ORDER_US, WINDOW_SAMPLES, READ_RATIO, SLICE_RATIO = (
    2.0,
    300.0,
    1.0,
    2.0,
    6.0,
    2.0,
)


def our_schedule(*phases: tuple[int, int, dict[str, float]]) -> Schedule:
    """Phases of (tokens, seq_length, weights)."""
    table = [
        {"name": f"p{i}", "tokens": tokens, "seq_length": length, "mixture": weights}
        for i, (tokens, length, weights) in enumerate(phases)
    ]
    table[0] |= {"global_batch_tokens": 512 * phases[0][1], "learning_rate": 1e-4}
    return build_schedule(Curriculum.model_validate({"phases": table}))


def our_order(schedule: Schedule, sizes: dict[str, int]) -> SampleOrder:
    """The sample order over sources of these sizes, without an epoch cap."""
    settings = {name: Source(shards=name, max_epochs=1e9) for name in sizes}
    return SampleOrder(schedule, sizes, seed=1, sources=settings)


def open_sources(root: Path) -> dict[str, ShardSet]:
    """The two sources of real tokens."""
    return {source: open_shards(root / source) for source in SHARDS}


def our_blend(root: Path, *weights: dict[str, float], num_samples: int) -> tuple[SampleOrder, dict]:
    """One phase a table of weights, ``num_samples`` each."""
    shard_sets = open_sources(root)
    phases = [(num_samples * SEQ_LENGTH, SEQ_LENGTH, table) for table in weights]
    sizes = {source: shard_set.num_tokens for source, shard_set in shard_sets.items()}
    return our_order(our_schedule(*phases), sizes), shard_sets


def start_ours(root: Path) -> None:
    """The first batch of the small blend."""
    order, shard_sets = our_blend(root, OLD_WEIGHTS, num_samples=DRAWN_BEFORE)
    cut_windows([shard_sets[name] for name in order.sources], order.lookup(np.arange(8)))


def start_ours_huge(root: Path) -> None:
    """The first batch of 15T tokens in 5,000 shards, two phases."""
    shard_set = open_shards(root / "huge")
    tokens = shard_set.num_tokens * 2 // 5
    schedule = our_schedule((tokens, 4096, {"huge": 1.0}), (tokens, 8192, {"huge": 1.0}))
    order = our_order(schedule, {"huge": shard_set.num_tokens})
    cut_windows([shard_set], order.lookup(np.arange(8)))


def start_core(root: Path) -> None:
    """The first sample of the same small blend, indices built."""
    core_blend(root, OLD_WEIGHTS, DRAWN_BEFORE)[0]


def our_replayed(root: Path) -> int:
    """The same for our order, with the weights changed by the next phase."""
    schedule = our_schedule(
        (DRAWN_BEFORE * SEQ_LENGTH, SEQ_LENGTH, OLD_WEIGHTS),
        (DRAWN_AFTER * SEQ_LENGTH, SEQ_LENGTH, NEW_WEIGHTS),
    )
    sizes = {source: shards.num_tokens for source, shards in open_sources(root).items()}
    order = our_order(schedule, sizes)
    samples = order.lookup(np.arange(DRAWN_BEFORE + DRAWN_AFTER))
    assert samples.epoch.max() == 0
    replayed = 0
    for source, name in enumerate(order.sources):
        times = np.zeros(sizes[name], np.int64)
        for first in samples.first_token[samples.source == source].tolist():
            times[first : first + SEQ_LENGTH] += 1
        replayed += int((times > 1).sum())
    return replayed


# -- measuring


def start_up(name: str, root: Path) -> tuple[float, float]:
    """(seconds, peak MB) of a fresh process up to its first sample."""
    report = subprocess.run(
        [sys.executable, "-m", "benchmarks.data_engine", "--start", name, "--root", str(root)],
        check=True, capture_output=True, text=True,
    ).stdout.splitlines()[-1]  # fmt: skip
    seconds, peak_mb = json.loads(report)
    return seconds, peak_mb


def median_us(calls: dict[str, Callable[[], int]], rounds: int = 15) -> dict[str, float]:
    """Median microseconds a sample; each call returns how many samples it read. Interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            count = call()
            times[name].append((time.perf_counter() - began) / count * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def window_swing(is_few: np.ndarray, window: int) -> float:
    """Largest |count - target| of one source in any window of this many samples."""
    counts = np.cumsum(np.concatenate([[0], is_few]))
    return float(np.abs(counts[window:] - counts[:-window] - OLD_WEIGHTS["few"] * window).max())


def order_us(num_sources: int) -> dict[str, float]:
    """Microseconds a sample to say which source it comes from and where in it."""
    from megatron.core.datasets import helpers

    rng = np.random.default_rng(0)
    shares = rng.random(num_sources)
    shares /= shares.sum()
    names = [f"s{i}" for i in range(num_sources)]
    weights = dict(zip(names, shares.tolist(), strict=True))
    schedule = our_schedule((10**13, 4096, weights))
    order = our_order(schedule, dict.fromkeys(names, 4 * 10**9))
    size = 20_000
    start = iter(range(10**6, 10**9, 65_536))

    def ours() -> int:
        first = next(start)
        order.lookup(np.arange(first, first + 65_536))
        return 65_536

    def core() -> int:
        index, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
        helpers.build_blending_indices(index, sample, shares, num_sources, size, False)
        return size

    return median_us({"ours": ours, "megatron-core": core}, rounds=5)


def read_us(root: Path) -> dict[str, float]:
    """Microseconds a sample: whole samples of both, and the tokens alone beside a bare slice.

    A whole sample is its place in the order, tokens, labels, loss mask and positions. Every shard
    is mapped and in memory before the clock starts.
    """
    dataset = core_blend(root, OLD_WEIGHTS, DRAWN_BEFORE)
    order, shard_sets = our_blend(root, OLD_WEIGHTS, num_samples=DRAWN_BEFORE)
    sets = [shard_sets[name] for name in order.sources]
    maps = [np.memmap(path, np.uint16, mode="r") for path in sorted((root / "many").glob("*.bin"))]
    rng = np.random.default_rng(0)
    batch = 256  # a step of 256 samples

    def sample() -> int:
        cut_windows(sets, order.lookup(rng.integers(0, DRAWN_BEFORE, batch)))
        return batch

    def core_sample() -> int:
        for number in rng.integers(0, DRAWN_BEFORE, batch).tolist():
            dataset[number]
        return batch

    def tokens() -> int:
        last = sets[0].num_tokens - SEQ_LENGTH - 1
        for first in rng.integers(0, last, batch).tolist():
            sets[0].read(first, SEQ_LENGTH + 1).astype(np.int64)
        return batch

    def bare_slice() -> int:
        shards = rng.integers(0, len(maps), batch).tolist()
        firsts = rng.integers(0, SHARD_TOKENS - SEQ_LENGTH - 1, batch).tolist()
        for shard, first in zip(shards, firsts, strict=True):
            maps[shard][first : first + SEQ_LENGTH + 1].astype(np.int64)
        return batch

    cut_windows(sets, order.lookup(np.arange(DRAWN_BEFORE)))
    for number in range(DRAWN_BEFORE):
        dataset[number]
    for shard in maps:
        shard.sum()
    calls = {"sample": sample, "core sample": core_sample, "tokens": tokens, "slice": bare_slice}
    return median_us(calls, rounds=61)


def main() -> int:
    """Run everything, print the table, say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--start", help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        began = _process_start()
        globals()[options.start](options.root)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps([time.time() - began, peak]))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        rows = _measure(Path(folder))
    return _print(rows)


def _process_start() -> float:
    """When this process was started, seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    booted = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - booted + ticks / os.sysconf("SC_CLK_TCK")


Row = tuple[str, str, str, str, bool]


def _measure(root: Path) -> list[Row]:
    write_corpora(root)
    rows: list[Row] = []
    huge_s, huge_mb = start_up("start_ours_huge", root)
    ours_s, ours_mb = start_up("start_ours", root)
    core_s, core_mb = start_up("start_core", root)
    rows.append(_row("first batch, 1,100 shards, s", f"{ours_s:.2f}", f"{core_s:.2f}", "", True))
    rows.append(_row("its peak memory, MB", f"{ours_mb:.0f}", f"{core_mb:.0f}", "", True))
    rows.append(_row("first batch, 15T tokens in 5,000 shards, s", f"{huge_s:.2f}", "-",
                     f"< {START_S:g}", huge_s < START_S))  # fmt: skip
    rows.append(_row("its peak memory, MB", f"{huge_mb:.0f}", "-", f"< {START_MB:g}",
                     huge_mb < START_MB))  # fmt: skip
    order = order_us(HUGE_SHARDS)
    rows.append(_row("order over 5,000 sources, us a sample", f"{order['ours']:.2f}",
                     f"{order['megatron-core']:.2f}", f"< {ORDER_US:g}",
                     order["ours"] < ORDER_US))  # fmt: skip
    read = read_us(root)
    ratio, slices = read["core sample"] / read["sample"], read["tokens"] / read["slice"]
    rows.append(_row("whole sample of 2,048 tokens, us", f"{read['sample']:.1f}",
                     f"{read['core sample']:.1f}", f"{READ_RATIO:g} x faster (is {ratio:.1f})",
                     ratio >= READ_RATIO))  # fmt: skip
    rows.append(_row("its tokens, us (beside: bare memory-map slice)", f"{read['tokens']:.2f}",
                     f"{read['slice']:.2f}", f"within {SLICE_RATIO:g} x (is {slices:.2f})",
                     slices <= SLICE_RATIO))  # fmt: skip
    rows += _mixture_rows(root)
    ours_again, core_again = (
        our_replayed(root),
        core_replayed(root, OLD_WEIGHTS, NEW_WEIGHTS, DRAWN_BEFORE, DRAWN_AFTER),
    )
    total = DRAWN_AFTER * SEQ_LENGTH
    rows.append(_row(f"tokens replayed in {DRAWN_AFTER:,} samples after a change of weights",
                     f"{ours_again:,}", f"{core_again:,} ({core_again / total:.0%})", "0",
                     ours_again == 0))  # fmt: skip
    return rows


def _mixture_rows(root: Path) -> list[Row]:
    dataset = core_blend(root, OLD_WEIGHTS, DRAWN_BEFORE)
    core_few = dataset.dataset_index[:DRAWN_BEFORE] < SHARDS["few"]
    order, _ = our_blend(root, OLD_WEIGHTS, num_samples=DRAWN_BEFORE)
    our_few = order.lookup(np.arange(DRAWN_BEFORE)).source == order.sources.index("few")
    rows = []
    for window in (64, 256, 1024):
        ours, core = window_swing(our_few, window), window_swing(core_few, window)
        what, target = f"worst mixture error in {window:,} samples", f"<= {WINDOW_SAMPLES:g}"
        rows.append(_row(what, f"{ours:.1f}", f"{core:.1f}", target, ours <= WINDOW_SAMPLES))
    return rows


def _row(what: str, ours: str, core: str, target: str, met: bool) -> Row:
    return what, ours, core, target, met


def _print(rows: list[Row]) -> int:
    table = Table("measure", "ours", "megatron-core", "to reach", "met")
    for what, ours, core, target, met in rows:
        table.add_row(what, ours, core, target, ("yes" if met else "NO") if target else "")
    Console().print(table)
    return 0 if all(met for *_, met in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
