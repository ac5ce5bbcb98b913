"""A run that stopped and went on is the run that never stopped: to the bit on the same layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import Runs, losses, newest_tensors, rows, verified_steps

TP2 = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}
PP2 = {"parallel.pipeline_model_parallel_size": 2}
SHARDED = {"parallel.use_distributed_optimizer": True}
INTERLEAVED = {**PP2, "parallel.virtual_pipeline_model_parallel_size": 2}
BF16 = {"training.precision": "bf16"}
INSIDE_SHORT, INSIDE_MIXED = 1900, 5500  # not where a checkpoint is due


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> Path:
    return runs.train("unbroken")


@pytest.mark.parametrize("stop_at_tokens", [INSIDE_SHORT, INSIDE_MIXED])
def test_same_layout_to_the_bit(runs: Runs, unbroken: Path, stop_at_tokens: int) -> None:
    name = f"stopped_at_{stop_at_tokens}"
    stopped = runs.train(name, stop_at_tokens=stop_at_tokens)
    assert stop_at_tokens <= rows(stopped)[-1]["consumed_tokens"] < stop_at_tokens + 512
    resumed = runs.train(name)
    assert rows(resumed) == rows(unbroken)
    assert rows(resumed, "eval/prose/loss_nats_per_token") == rows(
        unbroken, "eval/prose/loss_nats_per_token"
    )
    assert newest_tensors(resumed) == newest_tensors(unbroken)


def test_same_layout_to_the_bit_with_sharded_bf16_optimizer(runs: Runs) -> None:
    changes = {**SHARDED, **BF16, "training.ema_decay": 0.9}
    whole = runs.train("sharded_whole", ranks=2, changes=changes)
    runs.train("sharded", ranks=2, changes=changes, stop_at_tokens=INSIDE_SHORT)
    resumed = runs.train("sharded", ranks=2, changes=changes)
    assert rows(resumed) == rows(whole)
    assert newest_tensors(resumed) == newest_tensors(whole)


@pytest.mark.parametrize(
    ("before", "before_ranks", "after", "after_ranks"),
    [
        pytest.param(TP2, 2, {}, 1, id="tp2 to 1"),
        pytest.param({}, 1, {}, 2, id="1 to dp2"),
        pytest.param({}, 1, SHARDED, 2, id="1 to dp2 sharded"),
        pytest.param(SHARDED, 2, {}, 1, id="dp2 sharded to 1"),
        pytest.param(PP2, 2, TP2, 2, id="pp2 to tp2"),
        pytest.param(INTERLEAVED, 2, {}, 1, id="interleaved to 1"),
    ],
)
def test_another_layout_reads_the_same_samples_to_the_same_loss(
    runs: Runs,
    unbroken: Path,
    before: dict[str, Any],
    before_ranks: int,
    after: dict[str, Any],
    after_ranks: int,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    runs.train(name, ranks=before_ranks, changes=before, stop_at_tokens=INSIDE_SHORT)
    resumed = runs.train(name, ranks=after_ranks, changes=after)
    assert losses(resumed) == pytest.approx(losses(unbroken), abs=1e-4)
    consumed = "data/code/consumed_tokens"
    assert [row[consumed] for row in rows(resumed)] == [row[consumed] for row in rows(unbroken)]
    digest = "data/samples_digest"
    assert [row[digest] for row in rows(resumed)] == [row[digest] for row in rows(unbroken)]
    assert verified_steps(resumed) == len(rows(unbroken))


def test_bf16_main_parameters_move_between_optimizers(runs: Runs) -> None:
    """Without the fp32 copy the first losses after the move would be off by bf16's rounding."""
    whole = runs.train("bf16_whole", changes=BF16)
    runs.train("bf16", ranks=2, changes={**BF16, **SHARDED}, stop_at_tokens=INSIDE_SHORT)
    resumed = runs.train("bf16", changes=BF16)
    assert losses(resumed) == pytest.approx(losses(whole), abs=2e-2)
    assert len(losses(resumed)) == len(losses(whole))


def test_a_complete_run_started_again_does_nothing(runs: Runs, unbroken: Path) -> None:
    before = newest_tensors(unbroken), (unbroken / "metrics.jsonl").read_bytes()
    runs.train("unbroken")
    assert (newest_tensors(unbroken), (unbroken / "metrics.jsonl").read_bytes()) == before


def test_evaluations_are_neither_lost_nor_repeated_by_a_resume(runs: Runs) -> None:
    def evaluated(run: Path) -> list[int]:
        return [row["consumed_tokens"] for row in rows(run, "eval/prose/loss_nats_per_token")]

    cadence = {"evaluation.every_tokens": 1024}
    run = runs.train("evaluated", changes=cadence, stop_at_tokens=2048)
    assert evaluated(run) == [0, 1024, 2048]
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    is_last = [json.loads(x)["consumed_tokens"] == 2048 and "eval/time_s" in x for x in lines]
    metrics.write_text("".join(x for x, last in zip(lines, is_last, strict=True) if not last))
    runs.train("evaluated", changes=cadence, stop_at_tokens=3072)  # a signal had kept it from that
    assert evaluated(run) == [0, 1024, 2048, 3072]
    shutil.rmtree(run / "checkpoints")  # killed before its first one: begins from nothing
    runs.train("evaluated", changes=cadence, stop_at_tokens=1024)
    assert evaluated(run) == [0, 1024]
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
