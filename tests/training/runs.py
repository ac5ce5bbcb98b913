"""Whole runs of the tiny recipe on forked ranks, and what they left behind."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_curr.curriculum.schedule import StepPlan
from tests.ranks import run_ranks
from tests.training.tiny import recipe_values, write_recipe

CLOCKLESS = ("time_s", "perf/", "checkpoint/", "eval/time_s")


class Runs:
    """Makes runs of one corpus, each in a folder of its own."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus = corpus
        self.folder = folder

    def recipe(self, name: str, changes: dict[str, Any] | None = None) -> Path:
        """The recipe of run ``name``, with changes by dotted path."""
        values = copy.deepcopy(recipe_values(self.corpus, self.folder / name))
        for path, value in (changes or {}).items():
            *sections, last = path.split(".")
            target = values
            for section in sections:
                target = target[int(section)] if isinstance(target, list) else target[section]
            target[last] = value
        return write_recipe(self.folder / f"{name}.yaml", values)

    def train(
        self,
        name: str,
        *,
        ranks: int = 1,
        changes: dict[str, Any] | None = None,
        stop_at_tokens: int | None = None,
        node_local: Path | None = None,
    ) -> Path:
        """Start or resume run ``name``; returns its folder."""
        recipe = self.recipe(name, changes)
        run_ranks(train_rank, ranks, str(recipe), ranks, stop_at_tokens, node_local)
        return self.folder / name


def train_rank(
    rank: int,
    recipe: str,
    ranks: int,
    stop_at_tokens: int | None,
    node_local: Path | None = None,
) -> None:
    """What ``launch.worker`` does once the ranks have met."""
    from launch.meeting import Place
    from launch.worker import train_prepared
    from megatron_curr.recipe.load import load_recipe
    from megatron_curr.training.life import begin_life
    from megatron_curr.training.preflight import prepare
    from megatron_curr.training.signals import StopSignals

    place = Place(rank, ranks, rank, ranks)
    prepared = prepare(load_recipe(recipe), ranks)
    life = begin_life(prepared.folder, world_size=ranks) if rank == 0 else None
    train_prepared(
        prepared,
        place,
        life=life,
        signals=StopSignals(),
        stop_at_tokens=stop_at_tokens,
        node_local=node_local,
    )


def within_step(step: int, action: Callable[[], None]) -> None:
    """In a forked rank: do something in the step that follows ``step`` steps, once it has data."""
    from megatron_curr.training.run import Run

    take = Run.take

    def take_then(run: Run, plan: StepPlan) -> list[Any]:
        batches = take(run, plan)
        if run.step == step:
            action()
        return batches

    Run.take = take_then  # type: ignore[method-assign]


def rows(run: Path, name: str = "train/loss_nats_per_token") -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` with a value, by consumed tokens, without what a clock says."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {key: value for key, value in row.items() if not key.startswith(CLOCKLESS)}
        for row in found
        if name in row
    ]
    return sorted(kept, key=lambda row: row["consumed_tokens"])


def verified_steps(run: Path) -> int:
    """How many steps read what the ledger says, which must be all that the metrics tell of."""
    from megatron_curr.trace_verify import verify_run

    verdict = verify_run(run)
    assert verdict.agrees, verdict.as_text()
    assert (verdict.missing_tokens, verdict.num_without) == ((), 0)
    return verdict.num_steps


def rank_log(run: Path, rank: int = 0) -> Path:
    """A rank's log of the newest start."""
    return max((run / "logs").glob("[0-9]*")) / f"rank_{rank}.log"


def losses(run: Path) -> list[float]:
    """Training loss of every step."""
    return [row["train/loss_nats_per_token"] for row in rows(run)]


def newest_tensors(run: Path) -> dict[str, str]:
    """Checksums of the newest checkpoint's tensor files: weights and moments, to the bit."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: record["sha256"] for name, record in files.items() if name.endswith(".distcp")}


def tear(checkpoint: Path, pattern: str = "*.distcp") -> Path:
    """Change one byte in the middle of a file of a checkpoint."""
    victim = next(checkpoint.glob(pattern))
    with victim.open("r+b") as stream:
        stream.seek(os.fstat(stream.fileno()).st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 0xFF]))
    return victim
