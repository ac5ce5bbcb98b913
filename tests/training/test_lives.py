"""Real ranks whose incarnation ends: cleanly, by a hang, or because a successor took over."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_curr.incarnation.conclude import conclude
from megatron_curr.incarnation.record import TIMES, Record, incarnations
from megatron_curr.training.checkpoint_folder import go_back, list_checkpoints
from tests.ranks import RankError, run_ranks
from tests.training.runs import (
    Runs,
    newest_tensors,
    rank_log,
    rows,
    tear,
    train_rank,
    within_step,
)

HANGING = {"training.hang_least_s": 1.0, "training.hang_step_multiple": 5.0}


def records(run: Path) -> list[Record]:
    found = [incarnation.record for incarnation in incarnations(run)]
    assert None not in found
    return [record for record in found if record is not None]


@pytest.fixture(scope="module")
def unbroken(runs: Runs) -> Path:
    return runs.train("unbroken", ranks=2)


def test_every_start_leaves_a_record_and_the_accounts_add_up(runs: Runs) -> None:
    run = runs.train("stopped", ranks=2, stop_at_tokens=1900)
    runs.train("stopped", ranks=2)
    first, second = records(run)
    assert (first.verdict, first.cause, first.step) == ("stop", "stop-at", 8)
    assert (second.verdict, second.cause) == ("finished", "complete")
    assert (second.resumed_step, second.resumed_tokens) == (8, 2048)
    assert (second.step, second.saved_step, second.consumed_tokens) == (24, 24, 8192)
    assert second.num_ranks == 2 and len(second.nodes) == 1
    assert second.step_time_s and second.save_s and set(second.times_s) <= set(TIMES)
    for record in (first, second):
        wall_s = record.ended_at_s - record.began_at_s
        waited_s = record.times_s["queue"] + record.times_s["idle"]
        assert sum(record.times_s.values()) - waited_s == pytest.approx(wall_s, 0.05)
        assert record.times_s["queue"] == 0  # nothing was submitted
    between_s = max(second.began_at_s - first.ended_at_s, 0.0)
    assert second.times_s["idle"] == pytest.approx(between_s, abs=0.01)
    assert "rank 1 of 2, pid" in rank_log(run, 1).read_text().splitlines()[0]


def stop() -> None:
    """As a node that no longer answers."""
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_nothing() -> None:
    """As a lock that nobody gives back."""
    threading.Event().wait()


def train_with_one_that_hangs(rank: int, recipe: str, how: Callable[[], None]) -> None:
    if rank == 1:
        within_step(8, how)
    train_rank(rank, recipe, 2, None)


def end_of_a_hang(runs: Runs, name: str, how: Callable[[], None]) -> Record:
    recipe = runs.recipe(name, HANGING)
    with pytest.raises(RankError):
        run_ranks(train_with_one_that_hangs, 2, str(recipe), how, timeout_s=40.0)
    record = conclude(runs.folder / name)
    assert record is not None
    assert (record.verdict, record.cause, record.suspect_ranks) == ("continue", "hang", (1,))
    return record


def test_a_rank_that_is_stopped_ends_the_job_with_stacks_and_is_named(
    runs: Runs, unbroken: Path
) -> None:
    record, run = end_of_a_hang(runs, "hung", stop), runs.folder / "hung"
    assert "takes longer than" in record.detail and "rank 1 on" in record.detail
    assert 8 <= record.step < 24
    log = rank_log(run).read_text()
    assert "stacks of rank 0" in log and "train_prepared" in log
    runs.train("hung", ranks=2)
    assert newest_tensors(run) == newest_tensors(unbroken)
    last = records(run)[-1]
    assert last.lost_tokens == 256 * (record.step - last.resumed_step)


def test_a_rank_that_waits_for_nothing_says_where_it_stands(runs: Runs) -> None:
    record, run = end_of_a_hang(runs, "waiting", wait_for_nothing), runs.folder / "waiting"
    assert "rank 1 on" in record.detail and "wait" in record.detail.partition("it stands in")[2]
    for rank in (0, 1):
        assert f"stacks of rank {rank}" in rank_log(run, rank).read_text()
    assert "in wait_for_nothing" in rank_log(run, 1).read_text()


def train_in_chain(rank: int, recipe: str, stops: bool) -> None:
    os.environ["MEGATRON_CURR_CHAIN"] = "4711"
    if stops:
        within_step(10, stop)
    train_rank(rank, recipe, 2, None)


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def common_files(run: Path) -> dict[Path, bytes]:
    """All that is not one incarnation's own: not logs, nor what the first says of itself."""
    own = {"horizon", "alive", "beat.json", "ended.0.json", "ended.1.json"}
    files = [path for path in run.rglob("*") if path.is_file() and "logs" not in path.parts]
    return {
        path: path.read_bytes()
        for path in files
        if not (path.parent.name == "0001" and path.name in own)
    }


def test_ranks_that_live_on_after_a_successor_began_can_change_nothing(
    runs: Runs, unbroken: Path
) -> None:
    """As with a slurmd that died under its ranks: they sleep, the job starts again, they wake."""
    recipe, run = runs.recipe("zombie"), runs.folder / "zombie"
    with ThreadPoolExecutor(1) as threads:
        zombie = threads.submit(run_ranks, train_in_chain, 2, str(recipe), True, timeout_s=60.0)
        logs = [run / "logs" / "0001" / f"rank_{rank}.log" for rank in (0, 1)]
        deadline_s = time.monotonic() + 40
        pids: list[int] = []
        while len(pids) < 2 or not all(map(is_stopped, pids)):
            assert time.monotonic() < deadline_s and not zombie.done()
            pids = [int(log.read_text().split("pid ")[1].split()[0])
                    for log in logs if log.exists() and "pid " in log.read_text()]  # fmt: skip
            time.sleep(0.01)
        run_ranks(train_in_chain, 2, str(recipe), False)
        before = common_files(run)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        with pytest.raises(RankError):
            zombie.result()
    assert common_files(run) == before
    words = {ending.cause for ending in incarnations(run)[0].endings}
    assert "fenced" in words <= {"fenced", "lost-rank"}
    first, second = records(run)
    assert (first.cause, second.cause) == ("vanished", "complete")
    assert rows(run) == rows(unbroken)
    assert newest_tensors(run) == newest_tensors(unbroken)


def test_going_back_to_an_older_checkpoint_passes_over_torn_ones(runs: Runs) -> None:
    run = runs.train("back", changes={"checkpoint.keep_last": 9})
    before = rows(run), newest_tensors(run)
    assert [path.name[-2:] for path in list_checkpoints(run / "checkpoints")] == [
        "04", "08", "12", "16", "18", "20", "22", "24",
    ]  # fmt: skip
    tear(run / "checkpoints" / "step_00000016")
    chosen = go_back(run, before_step=18)
    assert chosen is not None and chosen.name == "step_00000012"
    assert go_back(run, before_step=4) is None
    assert sorted(p.name for p in (run / "checkpoints").glob("left-*"))[0] == "left-step_00000016"
    runs.train("back", changes={"checkpoint.keep_last": 9})
    assert "resumed at token 3072, step 12" in rank_log(run).read_text()
    assert (rows(run), newest_tensors(run)) == before
    assert records(run)[-1].lost_tokens == 8192 - 3072
