"""TensorBoard and W&B stand behind a wall: they may end or fail, and get every row once."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_curr.curriculum.ledger import Entry, open_ledger, read_ledger
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training import loggers
from megatron_curr.training.follow_metrics import Progress, area_of, rows_of_offline_run
from megatron_curr.training.loggers import Logger
from megatron_curr.training.metrics import MetricsFile
from tests.recipe.recipes import SOUND

LOSS = "train/loss_nats_per_token"


class Trainer:
    """Stands in for rank 0: writes rows, looks after one logger."""

    def __init__(self, run: Path, kind: str, *, resumed: int = -1) -> None:
        number = len(list((run / "incarnations").glob("*"))) + 1
        self.pen = run / "incarnations" / f"{number:04d}" / "pen"
        self.pen.mkdir(parents=True)
        self.file = MetricsFile(run / "metrics.jsonl")
        arguments = [str(run), str(number), str(resumed)]
        self.logger = Logger(kind, arguments, run / "logs")

    def train(self, first: int, last: int, *, scale: float = 1.0) -> None:
        """Steps of 10 tokens; every second one is evaluated after it."""
        for step in range(first, last + 1):
            clock = {"step": step, "consumed_tokens": 10 * step, "time_s": time.time()}
            self.file.write({**clock, "phase": "p", LOSS: scale * step})
            if step % 2 == 0:
                self.file.write({**clock, "phase": "p", "eval/a/loss_nats_per_token": 1.0})
            self.logger.look_after()

    def end(self) -> None:
        self.logger.end()
        self.logger.wait()

    @property
    def processes(self) -> list[psutil.Process]:
        assert self.logger._process is not None
        logger = psutil.Process(self.logger._process.pid)
        return [logger, *logger.children(recursive=True)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


def make_run(folder: Path) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"{SOUND}logging: {{wandb_project: p}}\n")
    curriculum = load_recipe(folder / "recipe.yaml").curriculum
    (first,) = open_ledger(curriculum)
    (folder / "ledger.jsonl").write_text(first.line() + "\n")
    return folder


def amend(run: Path, *, from_tokens: int) -> None:
    """What comes after these tokens is another run from now on."""
    with (run / "ledger.jsonl").open("a") as ledger:
        (first,) = read_ledger(run / "ledger.jsonl")
        edition = replace(first.edition, from_tokens=from_tokens)
        ledger.write(Entry(edition, "amended", first.hash).line() + "\n")


def drop_rows(run: Path, after: int) -> None:
    """What a start does that resumes from a checkpoint."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(x for x in lines if json.loads(x)["consumed_tokens"] <= after))


def board(run: Path, name: str = LOSS) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "logs" / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def wait_until(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until_s, "it never happened"
        time.sleep(0.05)


def test_a_board_shows_each_step_once_and_the_newest_after_a_crash(run: Path) -> None:
    first = Trainer(run, "tensorboard")
    first.train(1, 7)
    state = run / "logs" / "tensorboard.json"
    wait_until(lambda: Progress.read(state).sent.get("train") == 70)
    for process in first.processes:  # as rank 0 itself, with all that it started
        process.kill()
    first.end()
    drop_rows(run, 40)
    second = Trainer(run, "tensorboard", resumed=40)
    second.train(5, 9, scale=2)
    second.end()
    assert board(run) == [(10 * n, n if n < 5 else 2 * n) for n in range(1, 10)]
    assert [step for step, _ in board(run, "eval/a/loss_nats_per_token")] == [20, 40, 60, 80]


def test_rows_that_a_killed_logger_did_not_send_are_sent_by_the_next(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_AGAIN_AFTER_S", 0.0)
    monkeypatch.setattr(loggers, "_LOOK_EVERY_S", 0.0)
    trainer = Trainer(run, "tensorboard")
    for process in trainer.processes:
        process.kill()
        process.wait()
    with caplog.at_level(logging.WARNING):
        trainer.train(1, 30)  # notices, warns once and starts another
        trainer.end()
    assert len(caplog.records) == 1 and "training goes on" in caplog.text
    assert board(run) == [(10 * n, n) for n in range(1, 31)]


def test_a_logger_that_cannot_write_stops_nobody_and_catches_up(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run / "logs" / "tensorboard").touch()  # where its folder should be
    trainer = Trainer(run, "tensorboard")
    trainer.train(1, 3)
    trainer.end()
    (warning,) = caplog.records
    assert warning.getMessage().startswith("TensorBoard takes no rows (FileExistsError")
    (run / "logs" / "tensorboard").unlink()
    drop_rows(run, 20)
    again = Trainer(run, "tensorboard", resumed=20)
    again.train(3, 4)
    again.end()
    assert board(run) == [(10, 1), (20, 2), (30, 3), (40, 4)]


def test_wandb_outlives_slurms_signals_and_gets_every_row_once(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = Trainer(run, "wandb")
    first.train(1, 4)
    wait_until(lambda: len(first.processes) > 1)  # W&B's own service
    for process in first.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGUSR1)
    first.train(5, 7)
    first.end()
    assert not caplog.records
    drop_rows(run, 40)
    second = Trainer(run, "wandb", resumed=40)
    second.train(5, 9)
    second.end()
    amend(run, from_tokens=80)
    drop_rows(run, 80)
    amended = Trainer(run, "wandb", resumed=80)
    amended.train(9, 10, scale=2)
    amended.end()
    parts = sorted((run / "logs" / "wandb").glob("offline-run-*"))
    found = [row for part in parts for row in rows_of_offline_run(part)]
    losses = [(row["consumed_tokens"], row[LOSS]) for row in found if LOSS in row]
    assert losses == [*((10 * n, n) for n in range(1, 10)), (90, 18), (100, 20)]
    evaluated = [row["consumed_tokens"] for row in found if LOSS not in row]
    assert evaluated == [20, 40, 60, 80, 100]
    steps = [row["_step"] for row in found]
    assert steps == sorted(set(steps))
    run_id = Progress.read(run / "logs" / "wandb.json").id
    assert all(part.name.endswith(f"-small-{run_id}") for part in parts)


def test_a_missing_key_is_a_sentence(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    trainer = Trainer(run, "wandb")
    trainer.train(1, 2)
    trainer.end()
    (warning,) = caplog.records
    assert warning.getMessage().startswith(
        "W&B takes no rows (UsageError: No API key configured. Use `wandb login` to log in); "
        "training goes on, and they are sent from metrics.jsonl when it does or by the next start"
    )


def test_progress_tells_kinds_of_rows_apart_and_forgets_what_another_future_replaces() -> None:
    progress = Progress()
    step, evaluation = {"consumed_tokens": 10, LOSS: 1.0}, {"consumed_tokens": 10, "eval/time_s": 1}
    assert (area_of(step), area_of(evaluation), area_of({"step": 1})) == ("train", "eval", "")
    assert [progress.note(row) for row in (step, evaluation, step, evaluation)] == [
        True,
        True,
        False,
        False,
    ]
    progress.forget_after(5)
    assert progress.note(step) and progress.last_number == 82
    assert Progress().id != Progress().id  # two runs of one name
