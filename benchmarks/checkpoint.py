"""Saving 500M parameters: how long training stands still, against waiting for it and against cp.

    python -m benchmarks.checkpoint             # about 2 minutes and 14 GB of memory
    python -m benchmarks.checkpoint --millions 50 --folder /scratch

One process, one rank, fp32: weights and Adam's two moments, 12 bytes a parameter, onto the disk of
``--folder``. Meanwhile a stand-in for training updates every weight and moment in place, which is
what costs the forked writer most: the kernel copies every page that it shares with us. Three saves:
*sync* waits until the checkpoint is published; *async* goes on while it is written; *cp* is ``cp``
and ``fsync`` of the same files, which are read back by nobody. A checkpoint is also read back for
its checksums, so 1 times cp is not to be had.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.optimizer import MegatronOptimizer

from megatron_curr.parallel.groups import build_groups
from megatron_curr.plan.model_size import num_parameters
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.training.build import build_model
from megatron_curr.training.checkpoint import Checkpointer, SaveReport
from megatron_curr.training.checkpoint_folder import RunState, list_checkpoints
from megatron_curr.training.optimizer_state import fill_missing_state
from megatron_curr.units import format_bytes, format_count, format_duration

VOCAB_SIZE = 32_000
LAYERS = 24
ASYNC_MAY_BLOCK_S = 3.0  # at most the copy to host memory: on a CPU, planning and one fork


@dataclass(frozen=True)
class Times:
    """One way of getting the bytes onto the disk."""

    blocked_s: float
    total_s: float
    update_s: float | None = None  # the stand-in's slowest step meanwhile


def recipe_of(millions: int) -> Recipe:
    """A Llama of about so many million parameters in 24 layers."""
    width = 64
    while True:
        settings = {
            "model.preset": "null",
            "model.num_layers": LAYERS,
            "model.hidden_size": width,
            "model.ffn_hidden_size": 4 * width,
            "model.num_attention_heads": width // 64,
            "model.num_query_groups": width // 64,
            "model.vocab_size": VOCAB_SIZE,
            "model.max_position_embeddings": 256,
            "parallel.tensor_model_parallel_size": 1,
            "parallel.sequence_parallel": "false",
        }
        overrides = [f"{path}={value}" for path, value in settings.items()]
        recipe = load_recipe(shipped_recipe("demo_text.yaml"), overrides)
        assert isinstance(recipe, Recipe)
        if num_parameters(recipe.model, vocab_size=VOCAB_SIZE) >= millions * 1e6:
            return recipe
        width += 64


def state_of(step: int) -> RunState:
    """A clock, which is all that this is about."""
    return RunState(
        consumed_tokens=step,
        step=step,
        optimizer_step=step,
        ledger_head="0" * 64,
        recipe_fingerprint="benchmark",
        sources={},
        nonfinite_steps=0,
        nonfinite_in_a_row=0,
        keep=False,
        layout={"dp": 1},
        versions={},
    )


class StandIn:
    """What an optimizer does to memory in a step: every weight and moment is written."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        fill_missing_state(optimizer)
        self._tensors = [
            value
            for part in optimizer.chained_optimizers
            for parameter, state in part.optimizer.state.items()
            for value in (parameter.data, *state.values())
            if torch.is_tensor(value) and value.numel() > 1
        ]

    def update(self) -> float:
        """One step; how long it took."""
        began_s = time.perf_counter()
        for tensor in self._tensors:
            tensor.mul_(0.9999).add_(1e-6)
        return time.perf_counter() - began_s


def save_while_training(checkpointer: Checkpointer, training: StandIn) -> Times:
    """Begin a save, go on, publish when it is written."""
    failed = checkpointer.begin(state_of(2))
    assert failed is None, failed
    updates_s = [training.update()]
    while checkpointer.is_writing:
        updates_s.append(training.update())
    report = checkpointer.publish()
    return Times(report.blocked_s, report.total_s, max(updates_s))


def copy(source: Path, target: Path) -> Times:
    """``cp`` of a checkpoint, until it is on the disk."""
    began_s = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    for path in target.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    spent_s = time.perf_counter() - began_s
    return Times(spent_s, spent_s)


def measure(recipe: Recipe, folder: Path) -> tuple[dict[str, Times], int, float]:
    """Times by way, bytes of a checkpoint, and the stand-in's step alone."""
    groups = build_groups(recipe.parallel)
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=VOCAB_SIZE)
    training = StandIn(optimizer)
    checkpointer = Checkpointer(
        folder / "checkpoints",
        chunks=[chunk.module for chunk in chunks],
        optimizer=optimizer,
        pg_collection=groups.pg_collection,
        settings=recipe.checkpoint,
    )
    report: SaveReport = checkpointer.save(state_of(1))
    assert report.error is None, report.error
    times = {"sync": Times(report.total_s, report.total_s)}
    (first,) = list_checkpoints(folder / "checkpoints")
    alone_s = min(training.update() for _ in range(3))
    times["cp"] = copy(first, folder / "copy")
    shutil.rmtree(folder / "copy")
    times["async"] = save_while_training(checkpointer, training)
    return times, report.size_bytes, alone_s


def main() -> int:
    """Measure and print; 1 when an asynchronous save blocks for longer than it may."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=int, default=500, help="parameters of the model")
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary")
    options = parser.parse_args()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    recipe = recipe_of(options.millions)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        times, size_bytes, alone_s = measure(recipe, Path(folder))
    count = num_parameters(recipe.model, vocab_size=VOCAB_SIZE)
    table = Table(
        "way", "training stands still", "on disk after", "slowest step meanwhile",
        title=f"{format_count(count)} parameters, {format_bytes(size_bytes)}",
    )  # fmt: skip
    for way, taken in times.items():
        meanwhile = f"{taken.update_s / alone_s:.1f} x" if taken.update_s else ""
        table.add_row(
            way, format_duration(taken.blocked_s), format_duration(taken.total_s), meanwhile
        )
    Console(width=100).print(table)
    return 0 if times["async"].blocked_s <= ASYNC_MAY_BLOCK_S else 1


if __name__ == "__main__":
    raise SystemExit(main())
