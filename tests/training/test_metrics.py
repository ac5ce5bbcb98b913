"""metrics.jsonl: names, rows that are whole, rows that a resume writes again."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from megatron_curr.incarnation.fence import Pen
from megatron_curr.training.metrics import (
    METRICS,
    Metrics,
    MetricsFile,
    check_name,
    drop_rows_after,
)
from tests.ranks import run_ranks
from tests.training.runs import Runs, rows


def test_names_are_registered_once_and_others_are_refused() -> None:
    for name in METRICS:
        check_name(name.replace("<source>", "some/deep.source"))
    for name in ("train/loss", "loss_nats_per_token", "data/x/rows"):
        with pytest.raises(KeyError, match="not registered"):
            check_name(name)


def test_a_value_that_is_not_finite_is_null(tmp_path: Path) -> None:
    metrics = Metrics(MetricsFile(tmp_path / "m.jsonl"))
    metrics.write({"train/grad_norm": float("nan")}, step=1, consumed_tokens=5, phase="p")
    metrics.close()
    row = json.loads((tmp_path / "m.jsonl").read_text())
    assert row["train/grad_norm"] is None
    assert (row["step"], row["consumed_tokens"], row["phase"]) == (1, 5, "p")


def test_rows_after_the_clock_are_moved_aside(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    rows = [json.dumps({"consumed_tokens": tokens}) + "\n" for tokens in (0, 100, 200, 150, 300)]
    path.write_text("".join(rows) + '{"consumed_tok')
    pen, stale = Pen.beside(tmp_path), MetricsFile(path)
    lost = drop_rows_after(path, 150, aside=tmp_path / "logs", pen=pen)
    assert (lost.num_rows, lost.num_tokens) == (3, 150)
    assert path.read_text() == rows[0] + rows[1] + rows[3]
    (aside,) = (tmp_path / "logs").iterdir()
    assert aside.read_text() == rows[2] + rows[4] + '{"consumed_tok'
    stale.write({"consumed_tokens": 999})  # by an incarnation that has been fenced
    assert drop_rows_after(path, 150, aside=tmp_path / "logs", pen=pen).num_rows == 0
    assert path.read_text() == rows[0] + rows[1] + rows[3]


def test_a_disk_without_room_delays_rows_and_tears_none(tmp_path: Path) -> None:
    run_ranks(write_past_a_limit, 1, tmp_path / "m.jsonl")


def write_past_a_limit(rank: int, path: Path) -> None:
    metrics = MetricsFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    for number in range(10):
        metrics.write({"consumed_tokens": number, "filler": "x" * 20})
    written = path.read_text()
    assert 0 < len(written) <= 100 and written.endswith("}\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.write({"consumed_tokens": 10})
    metrics.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["consumed_tokens"] for row in rows] == list(range(11))


def test_tensorboard_and_utilisation_are_written_when_asked_for(runs: Runs) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"tensorboard": True, "peak_flops_per_device": 1e12}
    run = runs.train("logged", changes={"logging": settings}, stop_at_tokens=512)
    events = EventAccumulator(str(run / "logs" / "tensorboard"))
    events.Reload()
    written = rows(run)
    shown = [event.value for event in events.Scalars("train/loss_nats_per_token")]
    assert shown == pytest.approx([row["train/loss_nats_per_token"] for row in written])
    used = [json.loads(line).get("perf/mfu_frac") for line in (run / "metrics.jsonl").open()]
    assert [0 < value < 1 for value in used if value is not None] == [True] * len(written)
