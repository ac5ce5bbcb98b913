"""Preprocessing by the size of the corpus: whole processes in seconds, start-up included.

Beside ours, interleaved: *Megatron's fast loop* (gigatoken reads the file in a spawned process and
EODs are joined in numpy and written by ``IndexedDatasetBuilder``, as Megatron-LM's
``tools/preprocess_data_fast.py`` does) and, on corpora up to ``--slow-mb``, *Megatron's loop* of
``benchmarks/preprocess.py``.

    python -m benchmarks.preprocess_sizes --folder /tmp/bench --sizes-mb 10 113 500
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
from pathlib import Path

from benchmarks.preprocess import TOKENIZERS, Contenders, Timing, build_corpus, timed
from data_tools.train_tokenizer import train_tokenizer


def by_size(kind: str, model: Path, arguments: argparse.Namespace) -> None:
    """Whole processes by the size of the corpus, in seconds; prints a line a size and way."""
    output = arguments.folder / "out"
    commands = Contenders(kind, model, output, arguments.megatron)
    for megabytes in arguments.sizes_mb:
        folder = arguments.folder / f"{megabytes}mb"
        corpus, _ = build_corpus(folder, megabytes, slow_mb=0)
        ways = {"ours": commands.ours, "Megatron's fast loop": commands.fast_loop}
        if megabytes <= arguments.slow_mb:
            ways["Megatron's loop"] = commands.loop
        timings: dict[str, list[Timing]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, build in ways.items():
                shutil.rmtree(output, ignore_errors=True)
                output.mkdir(parents=True)
                timings[name].append(timed(build(corpus)))
        for name, found in timings.items():
            walls = sorted(timing.wall_s for timing in found)
            print(
                f"{TOKENIZERS[kind]}, {corpus.text_bytes / 1e6:.0f} MB, {name}: "
                f"{statistics.median(walls):.1f} s ({walls[0]:.1f} to {walls[-1]:.1f}), "
                f"{statistics.median(t.cpu_s for t in found):.1f} CPU s, "
                f"{max(t.peak_bytes for t in found) / 1e9:.1f} GB, load {os.getloadavg()[0]:.0f}",
                flush=True,
            )


def main() -> None:
    """Measure both kinds of tokenizer, trained on 30 MB of the corpus."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=[10, 113, 500])
    parser.add_argument("--slow-mb", type=int, default=113)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(TOKENIZERS), default=list(TOKENIZERS))
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        model = arguments.folder / ("bpe" if kind == "bpe" else "pieces.model")
        if not model.exists():
            corpus, _ = build_corpus(arguments.folder / "train", 30, slow_mb=0)
            train_tokenizer([corpus.path], model, kind=kind, vocab_size=32_000)
        by_size(kind, model, arguments)


if __name__ == "__main__":
    main()
