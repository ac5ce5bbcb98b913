"""Torn checkpoints, a full disk, retention: what a run does about its saves."""

from __future__ import annotations

import json
import os
import resource
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.conclude import conclude
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.checkpoint_folder import (
    find_fault,
    go_back,
    list_checkpoints,
    read_state,
)
from megatron_curr.training.preflight import prepare
from tests.ranks import RankError, run_ranks
from tests.training.runs import Runs, newest_tensors, rank_log, rows, tear, train_rank, within_step


@pytest.fixture(scope="module")
def finished(runs: Runs) -> Path:
    return runs.train("finished", changes={"checkpoint.keep_last": 3})


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(
        list_checkpoints(finished / "checkpoints")[-1], tmp_path / "step_00000024"
    )


def test_a_whole_checkpoint_has_no_fault(copy: Path) -> None:
    assert find_fault(copy) is None
    assert {path.name for path in copy.iterdir()} == {
        ".metadata", "__0_0.distcp", "common.pt", "manifest.json", "metadata.json", "state.json",
    }  # fmt: skip


def test_every_kind_of_damage_is_found(copy: Path) -> None:
    def fault_after(damage) -> str:  # type: ignore[no-untyped-def]
        broken = copy.with_name("broken")
        shutil.copytree(copy, broken)
        damage(broken)
        fault = find_fault(broken)
        shutil.rmtree(broken)
        assert fault is not None
        return fault

    assert "does not match its checksum" in fault_after(tear)
    assert "is missing" in fault_after(lambda folder: (folder / "common.pt").unlink())
    assert "bytes instead of" in fault_after(lambda f: os.truncate(f / "__0_0.distcp", 1000))
    assert "manifest.json cannot be read" in fault_after(lambda f: (f / "manifest.json").unlink())
    assert "not readable JSON" in fault_after(lambda f: os.truncate(f / "manifest.json", 50))
    assert "checksum" in fault_after(lambda f: tear(f, ".metadata"))

    def forget_the_clock(folder: Path) -> None:
        (folder / "state.json").write_text("{}")
        manifest = json.loads((folder / "manifest.json").read_text())
        del manifest["files"]["state.json"]
        (folder / "manifest.json").write_text(json.dumps(manifest))

    assert "state.json is unreadable" in fault_after(forget_the_clock)


def test_checksums_can_be_divided_between_ranks(copy: Path) -> None:
    tear(copy)
    faults = [find_fault(copy, share=(rank, 3)) for rank in range(3)]
    assert sum(fault is not None for fault in faults) == 1


def test_a_torn_checkpoint_is_passed_over_for_the_newest_intact_one(
    runs: Runs, finished: Path
) -> None:
    tensors, steps = newest_tensors(finished), rows(finished)
    checkpoints = list_checkpoints(finished / "checkpoints")
    tear(checkpoints[-1])
    (checkpoints[-2] / "common.pt").unlink()
    runs.train("finished", changes={"checkpoint.keep_last": 3})
    log = rank_log(finished).read_text()
    assert "step_00000024 is torn and was passed over: __0_0.distcp does not match" in log
    assert "step_00000022 is torn and was passed over: common.pt is missing" in log
    assert "resumed at token 6144, step 20" in log
    assert newest_tensors(finished) == tensors
    assert rows(finished) == steps  # the rows after token 6144 were written again, not doubled
    assert list((finished / "logs").glob("metrics_after_6144_*.jsonl"))
    assert (finished / "checkpoints" / "torn-step_00000024").is_dir()


def test_no_intact_checkpoint_is_an_error_that_loses_nothing(runs: Runs) -> None:
    run = runs.train("all_torn", stop_at_tokens=1024)
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    tear(checkpoint)
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(RankError, match=r"CheckpointError: .*no checkpoint is intact: step_0+4"):
        runs.train("all_torn")
    assert list_checkpoints(run / "checkpoints") == [checkpoint]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_save_by_way_of_the_nodes_own_disk_is_the_same(runs: Runs, tmp_path: Path) -> None:
    local = tmp_path / "scratch"
    local.mkdir()
    (local / "step_00000002-7.distcp").write_text("left by a rank that was killed")
    plain = runs.train("plain", ranks=2, stop_at_tokens=1024)
    run = runs.train("local", ranks=2, stop_at_tokens=1024, node_local=local)
    assert newest_tensors(run) == newest_tensors(plain)
    assert find_fault(list_checkpoints(run / "checkpoints")[-1]) is None
    assert list(local.iterdir()) == []  # carried, and gone
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert local.stat().st_mtime > first["time_s"]  # it was there
    with pytest.raises(RankError, match=r"BadNode: .*its own disk takes no checkpoint: .*File exi"):
        runs.train("local", ranks=2, node_local=runs.corpus / "tokenizer.model")
    with pytest.raises(RankError, match=r"SaveFailed: .*FileExistsError"):
        run_ranks(train_while_a_disk_goes, 2, str(runs.recipe("local")), local)
    assert newest_tensors(run) == newest_tensors(plain)


def train_while_a_disk_goes(rank: int, recipe: str, local: Path) -> None:
    """Of a run that stands at step 4 and saves at step 8."""

    def replace_it_by_a_file() -> None:
        local.rmdir()
        local.touch()

    if rank == 0:
        within_step(5, replace_it_by_a_file)
    train_rank(rank, recipe, 2, 2048, local)


def test_retention_keeps_the_last_ones_and_one_for_every_so_many_tokens(runs: Runs) -> None:
    changes = {"checkpoint.keep_last": 1, "checkpoint.keep_every_tokens": 2500}
    run = runs.train("retention", changes=changes)
    states = [read_state(path) for path in list_checkpoints(run / "checkpoints")]
    assert [state.consumed_tokens for state in states] == [3072, 5120, 8192]
    assert [state.keep for state in states] == [True, True, True]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000024\n"


def test_state_holds_the_clock_and_every_source(runs: Runs) -> None:
    run = runs.train("state", stop_at_tokens=5500)
    state = read_state(list_checkpoints(run / "checkpoints")[-1])
    assert (state.consumed_tokens, state.step, state.optimizer_step) == (5632, 19, 19)
    assert sum(source.consumed_tokens for source in state.sources.values()) == 5632
    assert state.layout == {"dp": 1, "tp": 1, "pp": 1, "cp": 1}
    assert {"torch", "megatron-core"} <= state.versions.keys()


def test_a_disk_that_fills_keeps_the_checkpoint_before_and_the_run_goes_on(runs: Runs) -> None:
    """The kernel refuses to let any file grow past a limit, as a full disk does (EFBIG, ENOSPC)."""
    run = runs.train("full_disk", stop_at_tokens=1024)
    intact = newest_tensors(run)
    with pytest.raises(RankError, match=r"SaveFailed: the last checkpoint, at token 3072"):
        run_ranks(train_with_small_files, 2, str(runs.recipe("full_disk")), 2, 3072)
    log = rank_log(run).read_text()
    assert "checkpoint of step 8 is given up (rank 0: " in log
    assert "the one before is intact, the run goes on" in log
    assert newest_tensors(run) == intact
    assert [path.name for path in (run / "checkpoints").iterdir() if path.is_dir()] == [
        "step_00000004"
    ]
    assert rows(run)[-1]["consumed_tokens"] == 3072  # steps went on after the save of step 8 failed
    resumed = runs.train("full_disk", stop_at_tokens=2048)
    assert find_fault(list_checkpoints(resumed / "checkpoints")[-1]) is None


def train_with_small_files(rank: int, recipe: str, ranks: int, stop_at_tokens: int) -> None:
    """From step 4 on each file may hold 200 kB: metrics and logs fit, tensors do not."""
    within_step(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)))
    train_rank(rank, recipe, ranks, stop_at_tokens)


def test_a_run_whose_saves_fail_stops_instead_of_training_for_nothing(runs: Runs) -> None:
    run = runs.train("failing", stop_at_tokens=1024)
    intact = newest_tensors(run)
    recipe = runs.recipe("failing", {"checkpoint.max_failed_saves": 2})
    with pytest.raises(RankError, match=r"SaveFailed: stopped at step 1[2-6]: 2 saves in a row"):
        run_ranks(train_with_small_files, 1, str(recipe), 1, None)
    assert rows(run)[-1]["step"] <= 16 and newest_tensors(run) == intact
    record = conclude(run)
    assert record is not None and (record.cause, record.saved_step) == ("save-failed", 4)


def test_checkpoints_may_lie_on_another_disk(runs: Runs, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second disk")
    with TemporaryDirectory(dir=memory) as disk:
        run = runs.folder / "linked"
        run.mkdir()
        (run / "checkpoints").symlink_to(disk)
        runs.train("linked", ranks=2, stop_at_tokens=2048)
        resumed = runs.train("linked", ranks=2, stop_at_tokens=3072)
        kept = [path.name for path in list_checkpoints(Path(disk))]
        assert kept == ["step_00000008", "step_00000012"]
        assert find_fault(list_checkpoints(resumed / "checkpoints")[-1]) is None
        went = go_back(resumed, before_step=12)
        assert went is not None and went.name == "step_00000008"
    with pytest.raises(CheckpointError, match=r"checkpoints is a link to .*, where there is no"):
        prepare(load_recipe(runs.recipe("linked")), 1)
