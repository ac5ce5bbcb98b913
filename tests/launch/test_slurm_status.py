"""What ``status`` says of a run folder where there is no Slurm to ask."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from launch.slurm.status import lines_of, read_status
from launch.slurm.submission import Submission, tell
from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.conclude import conclude
from megatron_curr.training.run_folder import RunFolder
from tests.incarnation.lives import an_ending, claimed


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Slurm's commands."""
    monkeypatch.setenv("PATH", "/nowhere")


def write_rows(run_folder: Path, *, steps: int) -> None:
    """``metrics.jsonl`` of a run that takes 100 tokens a step, with a row that still grows."""
    lines = [
        json.dumps(
            {
                "step": step,
                "consumed_tokens": 100 * step,
                "time_s": 1000.0 + step,
                "phase": "short",
                "train/loss_nats_per_token": 5 - step / 10,
                "perf/tokens_per_s": 50.0,
            }
        )
        for step in range(1, steps + 1)
    ]
    (run_folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9')


def submission(run_folder: Path) -> Submission:
    (run_folder / "slurm").mkdir(exist_ok=True)
    return Submission(
        number=1,
        run_folder=str(run_folder),
        name="run-1",
        by="singleton",
        max_jobs=None,
        num_nodes=1,
        spares=0,
        ranks_per_node=1,
        launcher="srun",
        rank_order="slurm",
        partition="batch",
        min_slice_s=1.0,
        max_fruitless=3,
        restarts_per_job=2,
        exclude_s=1.0,
        revision=None,
        is_changed=False,
        code="",
        submitted_at_s=0.0,
    )


def test_status_comes_from_the_run_folder_where_slurm_does_not_answer(tmp_path: Path) -> None:
    submission(tmp_path)
    write_rows(tmp_path, steps=3)
    status = read_status(tmp_path)
    assert status.state.startswith("unknown, as Slurm does not answer (squeue is not on the PATH")
    assert (status.step, status.consumed_tokens, status.phase) == (3, 300, "short")
    assert status.tokens_per_s == 50 and status.loss == 4.7
    assert json.loads(status.to_json())["step"] == 3
    assert dict(lines_of(status))["progress"] == "300 tokens, step 3, phase short"


def test_a_chain_that_stopped_says_why(tmp_path: Path) -> None:
    tell(submission(tmp_path), "stop", why="3 starts in a row made no checkpoint")
    status = read_status(tmp_path)
    assert status.state == "stopped: 3 starts in a row made no checkpoint"


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run here; give the run folder"):
        read_status(tmp_path)


def test_a_run_without_slurm_says_how_it_is_and_how_to_go_on(tmp_path: Path) -> None:
    """``PATH`` holds no squeue, and nothing of the answer speaks of one."""
    write_rows(tmp_path, steps=3)
    (tmp_path / "recipe.yaml").touch()
    assert read_status(tmp_path).state == "not started"
    own = {"host": socket.gethostname(), "job_id": None, "num_ranks": 2}
    incarnation = claimed(tmp_path, **own)
    with RunFolder(tmp_path).lock():
        assert (
            read_status(tmp_path).state == f"running: pid {os.getpid()} on {own['host']}, 2 ranks"
        )
    go_on = f"to go on: megatron-curr train {tmp_path} --ranks 2"
    assert read_status(tmp_path).state == (
        f"failed: all ranks ended before the first step without a word; {go_on}"
    )
    incarnation.leave_word(an_ending(0, "stop-at", detail="--stop-at 300: saved at token 300"))
    conclude(tmp_path)
    assert read_status(tmp_path).state == f"stopped: --stop-at 300: saved at token 300; {go_on}"
    claimed(tmp_path, **own).leave_word(an_ending(0, "complete"))
    conclude(tmp_path)
    assert read_status(tmp_path).state == "finished"
    elsewhere = claimed(tmp_path, host="node7", job_id=None)
    assert read_status(tmp_path).state.startswith("running: pid")
    os.utime(elsewhere.folder / "alive", (0, 0))
    assert read_status(tmp_path).state.startswith("failed: all ranks ended")
