"""Conversion beside ``cp``: speed and peak memory, on a synthetic Llama of 3.2 billion parameters.

    python -m benchmarks.convert --folder /tmp/convert_benchmark

Makes a bf16 checkpoint (6.4 GB), then, in turn and several times over, copies its files with
``cp``, exports it to a Hugging Face folder, imports that again and averages two of it, each target
removed before the next. ``cp`` does not flush to disk and the conversions do, so ``cp`` is timed
with ``sync`` of its files, and without. Memory is the process's own (``RssAnon``), without mapped
files. Needs 20 GB of disk; removes all of it at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import yaml

from megatron_curr.convert.export import export
from megatron_curr.convert.hf_config import choose_family
from megatron_curr.convert.import_model import import_model, model_section
from megatron_curr.convert.merge import merge
from megatron_curr.convert.source import MODEL_FILE, Source, open_source
from megatron_curr.convert.torch_dist_out import write_torch_dist
from megatron_curr.recipe.model import Model

GIB = 2**30


def synthetic_model(scale: int) -> Model:
    """Llama 3.2 3B; a larger ``scale`` has fewer layers."""
    return Model(
        num_layers=28 // scale,
        hidden_size=3072,
        ffn_hidden_size=8192,
        num_attention_heads=24,
        num_query_groups=8,
        kv_channels=128,
        vocab_size=128_256,
        max_position_embeddings=8192,
        rotary_base=500_000.0,
        untie_embeddings_and_output_weights=False,
    )


class SyntheticWeights:
    """Random bf16 rows of the right shapes; the same bytes again and again."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes
        self._noise = torch.randn(64 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def read(self, name: str, start: int = 0, end: int | None = None) -> torch.Tensor:
        rows, *columns = self._shapes[name]
        shape = ((rows if end is None else end) - start, *columns)
        return self._noise[: torch.Size(shape).numel()].view(shape)  # never more than a block


def write_synthetic(folder: Path, model: Model) -> None:
    """A converted checkpoint of the synthetic model."""
    shapes: dict[str, tuple[int, ...]] = {}
    family = choose_family(model)
    for piece in family.pieces(model, vocab_size=model.vocab_size or 0):
        rows = max(shapes.get(piece.stored, (0,))[0], max(end for _, end in piece.rows))
        shapes[piece.stored] = (rows, *piece.shape[1:])
    folder.mkdir(parents=True)
    write_torch_dist(SyntheticWeights(shapes), list(shapes), folder, model=model, dtype=None)
    told = {"architecture": family.architecture, "model": model_section(model)}
    (folder / MODEL_FILE).write_text(yaml.safe_dump(told))


class PeakMemory:
    """The most anonymous memory of this process while the block runs, in bytes."""

    def __enter__(self) -> PeakMemory:
        self.first, self.most, self._ended = self._now(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def average_of_two(checkpoint: Path) -> Source:
    """The mean of a checkpoint and itself."""
    return merge([open_source(checkpoint), open_source(checkpoint)], method="average", by=1.0)


def timed(action: Callable[[], object], target: Path) -> float:
    """Seconds; the target is removed before."""
    shutil.rmtree(target, ignore_errors=True)
    start_s = time.perf_counter()
    action()
    return time.perf_counter() - start_s


def copy(source: Path, target: Path, *, flush: bool) -> None:
    """What ``cp -r`` does, flushed to disk or not."""
    subprocess.run(["cp", "-r", source, target], check=True)
    if flush:
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="a fraction of the layers")
    options = parser.parse_args()
    folder: Path = options.folder
    checkpoint, copied, hf, back = (folder / name for name in ("checkpoint", "cp", "hf", "back"))
    model = synthetic_model(options.scale)
    actions: dict[str, tuple[Callable[[], object], Path]] = {
        "cp": (lambda: copy(checkpoint, copied, flush=False), copied),
        "cp and sync": (lambda: copy(checkpoint, copied, flush=True), copied),
        "checkpoint to hf": (lambda: export(open_source(checkpoint), hf), hf),
        "hf to checkpoint": (lambda: import_model(open_source(hf), back), back),
        "average of two": (lambda: import_model(average_of_two(checkpoint), back), back),
    }
    times: dict[str, list[float]] = {name: [] for name in actions}
    peaks: dict[str, int] = {}
    try:
        write_synthetic(checkpoint, model)
        size = sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))
        for _ in range(options.runs):
            for name, (action, target) in actions.items():
                with PeakMemory() as memory:
                    times[name].append(timed(action, target))
                peaks[name] = max(peaks.get(name, 0), memory.most)
                if target not in (hf,):
                    shutil.rmtree(target)
        print(json.dumps({"bytes": size, "times_s": times, "peaks_bytes": peaks}), file=sys.stderr)
        largest = 2 * (model.vocab_size or 0) * model.hidden_size
        print(f"{size / 1e9:.2f} GB, largest tensor {largest / GIB:.2f} GiB")
        for name, seconds in times.items():
            rates = sorted(size / 1e6 / second for second in seconds)
            print(
                f"{name:18} {median(rates):6.0f} MB/s ({rates[0]:.0f} to {rates[-1]:.0f}), "
                f"own memory {peaks[name] / GIB:.2f} GiB"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
