"""The fence: one incarnation may write, and what came before it can change nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation import fence
from megatron_curr.incarnation.fence import Fenced, Pen, fence_others, show_life
from megatron_curr.incarnation.record import incarnations, of_job
from tests.incarnation.lives import a_claim, claimed


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "incarnations" not in path.parts
    }


def test_a_stale_incarnation_can_neither_write_nor_name_nor_remove(tmp_path: Path) -> None:
    old = Pen(claimed(tmp_path).pen)
    (tmp_path / "step_1").mkdir()
    grown = old.make("step_2")
    (grown / "weights").write_text("stale")
    old.write(tmp_path / "recipe.yaml", "ours")
    new = Pen(claimed(tmp_path).pen)
    new.write(tmp_path / "recipe.yaml", "theirs")
    before = contents(tmp_path)
    for attempt in (
        old.check,
        lambda: old.write(tmp_path / "recipe.yaml", "stale"),
        lambda: old.write(tmp_path / "new", "stale"),
        lambda: old.put(grown, tmp_path / "step_2"),
        lambda: old.make("step_3"),
        lambda: old.take(tmp_path / "step_1"),
        lambda: old.remove(tmp_path / "step_1"),
    ):
        with pytest.raises(Fenced, match="this incarnation of the run is stale"):
            attempt()
    assert contents(tmp_path) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "incarnations", "recipe.yaml", "step_1",
    ]  # fmt: skip
    new.put(new.make("step_2"), tmp_path / "step_2")
    new.remove(tmp_path / "step_1")
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_2"]


def test_a_stale_save_that_makes_its_missing_folders_gets_no_pen_again(tmp_path: Path) -> None:
    old = Pen(claimed(tmp_path).pen)
    grown = old.make("step_2")
    claimed(tmp_path)
    with pytest.raises(OSError):
        grown.mkdir(parents=True, exist_ok=True)  # as torch's writer of checkpoints does
    with pytest.raises(Fenced):
        old.check()


def publish_for_ever(run: Path, ready: object) -> None:
    """A zombie: saves as fast as it can until it is told that it is stale; then exits with 7."""
    incarnation = claimed(run, job_id="old")
    pen = Pen(incarnation.pen)
    number = 0
    try:
        while True:
            number += 1
            grown = pen.make(f"step_{number:06d}")
            try:
                (grown / "weights").write_text("old")
            except OSError:
                pen.check()
                raise
            pen.put(grown, run / grown.name)
            pen.write(run / "latest", f"old {number}")
            ready.set()  # type: ignore[attr-defined]
    except Fenced:
        os._exit(7)


def test_a_zombie_that_saves_all_the_time_is_shut_out_at_one_instant(tmp_path: Path) -> None:
    """What it published before the instant stands, after it nothing of its appears."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    zombie = context.Process(target=publish_for_ever, args=(tmp_path, ready))
    zombie.start()
    assert ready.wait(20)
    incarnation = claimed(tmp_path, job_id="new")
    steps, latest = sorted(tmp_path.glob("step_*")), (tmp_path / "latest").read_text()
    zombie.join(20)
    assert zombie.exitcode == 7
    assert (sorted(tmp_path.glob("step_*")), (tmp_path / "latest").read_text()) == (steps, latest)
    assert not list((tmp_path / "incarnations").glob("*/taken-*"))
    assert (incarnation.number, incarnation.pen.is_dir()) == (2, True)


def test_a_zombie_that_slept_through_its_end_finds_out_when_it_wakes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    zombie = context.Process(target=publish_for_ever, args=(tmp_path, ready))
    zombie.start()
    assert ready.wait(20) and zombie.pid
    os.kill(zombie.pid, signal.SIGSTOP)
    claimed(tmp_path)
    before = contents(tmp_path)
    os.kill(zombie.pid, signal.SIGCONT)
    zombie.join(20)
    assert (zombie.exitcode, contents(tmp_path)) == (7, before)


def claim_and_report(run: Path, start: object, numbers: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    numbers.put(claimed(run).number)  # type: ignore[attr-defined]


def test_of_many_that_claim_at_once_each_gets_a_number_and_the_last_the_pen(
    tmp_path: Path,
) -> None:
    context = multiprocessing.get_context("fork")
    start, numbers = context.Event(), context.Queue()
    claimants = [
        context.Process(target=claim_and_report, args=(tmp_path, start, numbers)) for _ in range(8)
    ]
    for process in claimants:
        process.start()
    start.set()
    got = sorted(numbers.get(timeout=20) for _ in claimants)
    for process in claimants:
        process.join()
    assert got == list(range(1, 9))
    assert [i.number for i in incarnations(tmp_path) if i.pen.is_dir()] == [8]


def test_another_chain_on_another_node_is_refused_while_the_first_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fence, "ALIVE_EVERY_S", 0.05)
    monkeypatch.setattr(fence, "_WATCH_S", 0.3)
    first = claimed(tmp_path, job_id="1", chain="one", host="node0")
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.05):
            show_life(first)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(CheckpointError, match=r"already in use by job 1 on host node0"):
            claimed(tmp_path, job_id="2", chain="two", host="node1")
        assert first.pen.is_dir()
        # One of its own chain is stale by definition: Slurm starts the next when it is gone.
        assert claimed(tmp_path, job_id="3", chain="one", host="node2").number == 2
    finally:
        ended.set()
        thread.join()
    began_s = time.monotonic()
    assert claimed(tmp_path, job_id="4", chain="two", host="node1").number == 3
    assert time.monotonic() - began_s > 0.3  # it looked whether the second one was alive
    assert claimed(tmp_path, job_id="5", chain="three", host="node1").number == 4


def test_a_job_finds_its_own_incarnation(tmp_path: Path) -> None:
    claimed(tmp_path, job_id="7", restart=0)
    claimed(tmp_path, job_id="7", restart=1)
    claimed(tmp_path, job_id="8", restart=0)
    found = of_job(tmp_path, "7", 1)
    assert found is not None and found.number == 2
    assert of_job(tmp_path, "9") is None
    assert a_claim(1).from_json(a_claim(1).to_json()) == a_claim(1)
    fence_others(tmp_path, 99)
    assert [i.number for i in incarnations(tmp_path) if i.pen.is_dir()] == []


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    with TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


def test_checkpoints_on_another_disk_have_pens_there_that_are_taken_too(
    tmp_path: Path, other_disk: Path
) -> None:
    (tmp_path / "checkpoints").symlink_to(other_disk)
    first = claimed(tmp_path)
    assert first.checkpoint_pen == tmp_path / "checkpoints" / ".pens" / "0001"
    old = Pen(first.checkpoint_pen)
    old.put(old.make("step_1"), tmp_path / "checkpoints" / "step_1")
    grown = old.make("step_2")
    new = Pen(claimed(tmp_path).checkpoint_pen)
    for attempt in (
        lambda: old.put(grown, tmp_path / "checkpoints" / "step_2"),
        lambda: old.make("step_3"),
        lambda: old.remove(tmp_path / "checkpoints" / "step_1"),
        lambda: old.write(tmp_path / "checkpoints" / "latest", "step_2"),
    ):
        with pytest.raises(Fenced, match="this incarnation of the run is stale"):
            attempt()
    assert sorted(path.name for path in other_disk.iterdir()) == [".pens", "step_1"]
    new.put(new.make("step_2"), tmp_path / "checkpoints" / "step_2")
    new.remove(tmp_path / "checkpoints" / "step_1")
    assert [path.name for path in other_disk.glob("step_*")] == ["step_2"]


def test_a_pen_on_another_disk_cannot_be_made_after_a_successor_came(
    tmp_path: Path, other_disk: Path
) -> None:
    """The first stalls between its claim and its second pen; the second comes meanwhile."""
    first = claimed(tmp_path)
    (tmp_path / "checkpoints").symlink_to(other_disk)
    second = claimed(tmp_path)
    with pytest.raises(FileExistsError):
        first.far_pen.mkdir()
    assert second.far_pen.is_dir()
    with pytest.raises(Fenced):
        Pen(first.checkpoint_pen).make("step_1")


def test_one_disk_needs_one_pen(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    incarnation = claimed(tmp_path)
    assert incarnation.checkpoint_pen == incarnation.pen
    assert list((tmp_path / "checkpoints").iterdir()) == []
