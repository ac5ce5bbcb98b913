"""Preprocessing beside what others run: from a jsonl file to finished shards, whole processes.

Five ways over the same corpus and tokenizer with two workers, one after the other in each round, so
that other work on the machine hits all of them alike:

* *raw engine*: gigatoken reads the file by itself and keeps the ids in memory; no shard
* *ours*: ``megatron-curr preprocess``, with its checks, checksums and document table
* *Megatron's loop*: ``json.loads`` a line, one call of megatron-core's tokenizer a document, a pool
  of workers that hands lists back, ``IndexedDatasetBuilder`` in the parent
* *Megatron's script*: ``tools/preprocess_data.py`` of a checkout, with ``--megatron FOLDER``
* *datatrove*: its ``MegatronDocumentTokenizer``, where it is installed

The slow ones read the first megabytes of the corpus only, so their start-up is left out where ours
is compared with them. All figures are MB of text a second. Exit code 1 when a target is missed.

    python -m benchmarks.preprocess --folder /tmp/bench --corpus-mb 200
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import psutil

from data_tools.train_tokenizer import train_tokenizer

SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".h", ".hpp", ".cpp", ".js", ".html")
MAX_DOCUMENT_BYTES = 1_000_000
TOKENIZERS = {"bpe": "byte-level BPE 32k", "sentencepiece": "SentencePiece BPE 32k"}
RAW_SHARE, LOOP_TIMES, PEAK_MB = 0.7, {"bpe": 40.0, "sentencepiece": 8.0}, 1_500

RAW = """
import sys, time, gigatoken
kind, model, corpus = sys.argv[1:]
load = gigatoken.Tokenizer if kind == "bpe" else gigatoken.Tokenizer.from_sentencepiece
tokenizer = load(model)
began = time.perf_counter()
tokenizer.encode_files(gigatoken.JsonlFileSource([corpus]))
print("inner", time.perf_counter() - began)
"""

LOOP = """
import json, multiprocessing, sys, time, torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
kind, model, corpus, output = sys.argv[1:]
library = {"bpe": "huggingface"}.get(kind, kind)

def start():
    global tokenizer
    tokenizer = MegatronTokenizer.from_pretrained(model, {"library": library})

def encode(line):
    return tokenizer.tokenize(json.loads(line)["text"]) + [tokenizer.eod]

if __name__ == "__main__":
    start()
    began = time.perf_counter()
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(output + ".bin", dtype=dtype)
    with multiprocessing.get_context("fork").Pool(2, start) as pool, open(corpus) as lines:
        for ids in pool.imap(encode, lines, 32):
            builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(output + ".idx")
    print("inner", time.perf_counter() - began)
"""

FAST_LOOP = """
import multiprocessing, sys
import awkward, gigatoken, numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.tokenizers import MegatronTokenizer
kind, model, corpus, output = sys.argv[1:]

def process():
    library = {"bpe": "huggingface"}.get(kind, kind)
    eod = MegatronTokenizer.from_pretrained(model, {"library": library}).eod
    load = gigatoken.Tokenizer if kind == "bpe" else gigatoken.Tokenizer.from_sentencepiece
    tokenizer = load(model)
    rows = tokenizer.encode_files(gigatoken.JsonlFileSource([corpus])).layout
    offsets = np.asarray(rows.offsets.data)
    ids = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builder = IndexedDatasetBuilder(output + ".bin", dtype=dtype)
    ids = np.insert(ids.astype(dtype), offsets[1:] - offsets[0], eod)
    builder.data_file.write(ids.tobytes())
    builder.sequence_lengths += (np.diff(offsets) + 1).tolist()
    builder.document_indices += range(1, len(offsets))
    builder.finalize(output + ".idx")

if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(process)
"""

DATATROVE = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
kind, model, folder, output = sys.argv[1:]
if __name__ == "__main__":
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(folder),
            MegatronDocumentTokenizer(output_folder=output, tokenizer_name_or_path=model),
        ],
        tasks=2, workers=2, logging_dir=output + "_logs",
    ).run()
"""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A jsonl file, and how much text is in it."""

    path: Path
    text_bytes: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One whole process and its children together: seconds, cores' seconds, resident memory."""

    wall_s: float
    cpu_s: float
    peak_bytes: int
    inner_s: float | None = None


def build_corpus(folder: Path, megabytes: int, *, slow_mb: int) -> tuple[Corpus, Corpus]:
    """The text of what is installed here, and the beginning of it for the slow ones.

    Where that is less than ``megabytes`` it comes again: the engines remember words, of which a
    larger corpus has hardly more, and nobody remembers documents.
    """
    full, short = folder / "full" / "corpus.jsonl", folder / "short" / "corpus.jsonl"
    sizes = [0, 0]
    for path in (full, short):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open(full, "w") as whole, open(short, "w") as beginning:
        for text in chain.from_iterable(installed_texts() for _ in repeat(None)):
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            whole.write(line)
            sizes[0] += len(text.encode())
            if sizes[1] < slow_mb * 1e6:
                beginning.write(line)
                sizes[1] = sizes[0]
            if sizes[0] >= megabytes * 1e6:
                break
    return Corpus(full, sizes[0]), Corpus(short, sizes[1])


def installed_texts() -> Iterator[str]:
    """Text files below this Python, in the order of a hash of their paths."""
    roots = {Path(sys.prefix), Path(sys.base_prefix)}
    files = [
        Path(folder) / name
        for root in roots
        for folder, _, names in os.walk(root)
        for name in names
        if name.endswith(SUFFIXES)
    ]
    for path in sorted(files, key=lambda file: hash_of(str(file))):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if 200 < len(text) < MAX_DOCUMENT_BYTES:
            yield text


def hash_of(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def timed(command: list[str]) -> Timing:
    """Run a command and watch its memory. Raises ``RuntimeError`` where it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    peak = 0
    cpu_s: dict[int, float] = {}  # of each process, as last seen
    watched = psutil.Process(process.pid)
    while True:
        try:
            out, error = process.communicate(timeout=0.05)
            break
        except subprocess.TimeoutExpired:
            peak = max(peak, watch(watched, cpu_s))
    wall_s = time.perf_counter() - began
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{error}")
    inner = [line.split()[1] for line in out.splitlines() if line.startswith("inner ")]
    return Timing(wall_s, sum(cpu_s.values()), peak, float(inner[0]) if inner else None)


def environment() -> dict[str, str]:
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def watch(process: psutil.Process, cpu_s: dict[int, float]) -> int:
    """Note the time each process took so far; their resident memory together, bytes."""
    total = 0
    with suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                times = one.cpu_times()
                cpu_s[one.pid] = times.user + times.system
                total += one.memory_info().rss
    return total


class Contenders:
    """The commands, for one tokenizer."""

    def __init__(self, kind: str, model: Path, output: Path, megatron: Path | None) -> None:
        self.kind, self.model, self.output, self.megatron = kind, model, output, megatron

    def raw(self, corpus: Corpus) -> list[str]:
        return [sys.executable, "-c", RAW, self.kind, str(self.model), str(corpus.path)]

    def ours(self, corpus: Corpus, *, special_tokens: str = "text") -> list[str]:
        command = [sys.executable, "-m", "megatron_curr", "preprocess", str(corpus.path)]
        command += ["--tokenizer", str(self.model), "--output", str(self.output / "ours")]
        # Several shards, as any corpus has that is worth the time; one is written by one worker.
        command += ["--shard-tokens", "100000000"]
        command += ["--special-tokens", special_tokens, "--heldout-frac", "0"]
        return [*command, "--workers", "2", "--json"]

    def loop(self, corpus: Corpus) -> list[str]:
        script = self.output / "loop.py"
        script.write_text(LOOP)
        output = str(self.output / "loop")
        return [sys.executable, str(script), self.kind, str(self.model), str(corpus.path), output]

    def fast_loop(self, corpus: Corpus) -> list[str]:
        script = self.output / "fast_loop.py"
        script.write_text(FAST_LOOP)
        output = str(self.output / "fast")
        return [sys.executable, str(script), self.kind, str(self.model), str(corpus.path), output]

    def script(self, corpus: Corpus) -> list[str]:
        assert self.megatron is not None
        kind = "HuggingFaceTokenizer" if self.kind == "bpe" else "SentencePieceTokenizer"
        command = [sys.executable, str(self.megatron / "tools" / "preprocess_data.py")]
        command += ["--input", str(corpus.path), "--output-prefix", str(self.output / "script")]
        command += ["--tokenizer-type", kind, "--tokenizer-model", str(self.model)]
        return [*command, "--append-eod", "--workers", "2"]

    def datatrove(self, corpus: Corpus) -> list[str]:
        script = self.output / "datatrove_run.py"
        script.write_text(DATATROVE)
        halves = self.output / "halves"
        halves.mkdir(exist_ok=True)
        lines = corpus.path.read_text().splitlines(keepends=True)
        for number in range(2):
            (halves / f"{number}.jsonl").write_text("".join(lines[number::2]))
        model = self.model / "tokenizer.json" if self.model.is_dir() else self.model
        output = str(self.output / "datatrove")
        return [sys.executable, str(script), self.kind, str(model), str(halves), output]


def measure(
    kind: str, model: Path, full: Corpus, short: Corpus, arguments: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median figures of every contender."""
    output = arguments.folder / "out"
    commands = Contenders(kind, model, output, arguments.megatron)
    ways = {
        "raw engine": (commands.raw, full),
        "ours": (commands.ours, full),
        "Megatron's loop": (commands.loop, short),
    }
    if arguments.megatron:
        ways["Megatron's script"] = (commands.script, short)
    if kind == "bpe" and importlib.util.find_spec("datatrove"):
        ways["datatrove"] = (commands.datatrove, short)
    timings: dict[str, list[Timing]] = {name: [] for name in ways}
    for number in range(arguments.rounds):
        for name, (build, corpus) in ways.items():
            shutil.rmtree(output, ignore_errors=True)
            output.mkdir(parents=True)
            found = timed(build(corpus))
            timings[name].append(found)
            size = corpus.text_bytes / 1e6
            print(
                f"{kind} round {number + 1}: {name} {size / found.wall_s:.1f} MB/s, "
                f"{size / found.cpu_s:.1f} MB a CPU second, load {os.getloadavg()[0]:.0f}",
                file=sys.stderr,
            )
    check_bytes(commands, short, output)
    return {name: figures(found, ways[name][1]) for name, found in timings.items()}


def figures(found: list[Timing], corpus: Corpus) -> dict[str, float]:
    rates = sorted(corpus.text_bytes / 1e6 / timing.wall_s for timing in found)
    inner = [corpus.text_bytes / 1e6 / timing.inner_s for timing in found if timing.inner_s]
    return {
        "mb_per_s": statistics.median(rates),
        "lowest": rates[0],
        "highest": rates[-1],
        "mb_per_cpu_s": statistics.median(corpus.text_bytes / 1e6 / t.cpu_s for t in found),
        "peak_mb": max(timing.peak_bytes for timing in found) / 1e6,
        "text_mb": corpus.text_bytes / 1e6,
        **({"inner_mb_per_s": statistics.median(inner)} if inner else {}),
    }


def check_bytes(commands: Contenders, short: Corpus, output: Path) -> None:
    """Our shard of the short corpus is the loop's, byte for byte."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    # The Hugging Face tokenizer takes a special token that is typed in a text for the token.
    timed(commands.ours(short, special_tokens="allow" if commands.kind == "bpe" else "text"))
    timed(commands.loop(short))
    for suffix in (".bin", ".idx"):
        ours = (output / "ours" / "train" / f"ours_train_00000{suffix}").read_bytes()
        assert ours == (output / f"loop{suffix}").read_bytes(), suffix


def main() -> int:
    """Measure every kind of tokenizer, print the tables, say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--corpus-mb", type=int, default=200)
    parser.add_argument("--slow-mb", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=list(TOKENIZERS), default=list(TOKENIZERS))
    parser.add_argument("--megatron", type=Path, help="a checkout of Megatron-LM")
    arguments = parser.parse_args()
    missed = False
    full, short = build_corpus(arguments.folder, arguments.corpus_mb, slow_mb=arguments.slow_mb)
    for kind in arguments.kinds:
        model = arguments.folder / ("bpe" if kind == "bpe" else "pieces.model")
        if not model.exists():
            train_tokenizer([full.path], model, kind=kind, vocab_size=32_000)
        table = measure(kind, model, full, short, arguments)
        print(f"{TOKENIZERS[kind]}, {full.text_bytes / 1e6:.0f} MB of text")
        for name, row in table.items():
            inner = row.get("inner_mb_per_s")
            print(
                f"  {name:18} {row['mb_per_s']:8.1f} MB/s ({row['lowest']:.1f} to "
                f"{row['highest']:.1f}), {row['mb_per_cpu_s']:.1f} MB a CPU second, "
                f"peak {row['peak_mb']:,.0f} MB"
                + (f", without start-up {inner:.1f} MB/s" if inner else "")
            )
        (arguments.folder / f"{kind}.json").write_text(json.dumps(table, indent=1))
        missed |= not reaches(table, LOOP_TIMES[kind])
    return int(missed)


def reaches(table: dict[str, dict[str, float]], loop_times: float) -> bool:
    """Say how ours compares with the raw engine and Megatron's loop, and whether that is enough."""
    ours, raw = table["ours"], table["raw engine"]
    share = ours["mb_per_s"] / raw["mb_per_s"]
    times = ours["mb_per_s"] / table["Megatron's loop"]["inner_mb_per_s"]
    rows = (
        (f"{share:.0%} of the raw engine", f"{RAW_SHARE:.0%}", share >= RAW_SHARE),
        (f"{times:.1f} x the loop", f"{loop_times:g} x", times >= loop_times),
        (f"{ours['peak_mb']:,.0f} MB", f"< {PEAK_MB:,} MB", ours["peak_mb"] < PEAK_MB),
    )
    for found, target, met in rows:
        print(f"  ours: {found}, to reach {target}: {'yes' if met else 'NO'}")
    return all(met for *_, met in rows)


if __name__ == "__main__":
    raise SystemExit(main())
