"""Ranks find their place and each other from what Slurm or torchrun tell them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.meeting import Place, excuse, expand_counts, expand_nodes, join, meet
from megatron_curr.errors import DataError
from megatron_curr.training.life import NoMeeting
from tests.ranks import run_ranks

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURMD_NODENAME": "node2",
}
RANKS = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
TORCHRUN = {**RANKS, "TORCHELASTIC_RUN_ID": "x"}


def test_a_place_from_srun_from_torchrun_and_from_nobody() -> None:
    place = Place.from_environment(SLURM)
    assert (place.rank, place.world_size, place.local_rank, place.local_world_size) == (5, 6, 1, 2)
    assert (place.node, place.job, place.finds_others_by_slurm) == ("node2", "4711.2.0", True)
    assert str(place) == f"rank 5 of 6, pid {os.getpid()} on node2, job 4711.2.0"
    both = Place.from_environment({**SLURM, **TORCHRUN})  # torchrun that srun has started
    assert (both.rank, both.world_size, both.local_rank, both.local_world_size) == (3, 4, 1, 2)
    assert not both.finds_others_by_slurm and both.node == "node2"
    stray = Place.from_environment({**SLURM, **RANKS})  # of the shell where submit was typed
    assert stray == place and stray.finds_others_by_slurm
    assert Place.from_environment({**SLURM, **TORCHRUN}, launcher="srun") == place
    assert Place.from_environment({**SLURM, **RANKS}, launcher="torchrun") == both
    batch_script = {key: value for key, value in SLURM.items() if "STEP" not in key}
    alone = Place.from_environment(batch_script)
    assert (alone.rank, alone.world_size, alone.finds_others_by_slurm) == (0, 1, False)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[0-2,7],login", ["node0", "node1", "node2", "node7", "login"]),
        ("gpu[08-10]-ib", ["gpu08-ib", "gpu09-ib", "gpu10-ib"]),
        ("r[1-2]n[1,3]", ["r1n1", "r1n3", "r2n1", "r2n3"]),
        ("a,b[01]", ["a", "b01"]),
    ],
)
def test_slurm_shorthand_of_nodes(text: str, names: list[str]) -> None:
    assert expand_nodes(text) == names


def test_slurm_shorthand_of_tasks() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]


def meet_by_slurm(rank: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    dist.destroy_process_group()
    os.environ["SLURM_LAUNCH_NODE_IPADDR"] = "127.0.0.1"
    place = Place.from_environment(
        {**SLURM, "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3"}
    )
    (folder / "meeting-4711.1.0.json").write_text('{"port": 1}')  # of an earlier start
    join(place, None, meeting_folder=folder)
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    assert (float(total), dist.get_rank(), dist.get_world_size()) == (3.0, rank, 3)


def test_ranks_that_srun_started_meet_in_the_run_folder(tmp_path: Path) -> None:
    run_ranks(meet_by_slurm, 3, tmp_path)
    assert not (tmp_path / "meeting-4711.2.0.json").exists()


def test_a_rank_that_cannot_start_says_so_and_nobody_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[0-2]")
    at_node2 = Place(2, 3, 0, 1, node="node2", job="1.0.0", finds_others_by_slurm=True)
    excuse(at_node2, tmp_path, DataError("data/code: no shards here"))
    place = Place(0, 3, 0, 1, node="node0", job="1.0.0", finds_others_by_slurm=True)
    with pytest.raises(NoMeeting, match=r"rank 2 on node2 cannot start, .*no shards here") as told:
        meet(place, tmp_path, timeout_s=30.0)
    assert told.value.bad_nodes == ("node2",)


def test_who_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[0-2]")
    place = Place(0, 2, 0, 1, node="node0", job="1.0.0", finds_others_by_slurm=True)
    with pytest.raises(NoMeeting, match=r"1 of 2 ranks did not come within 0.2 s: 1; no rank of "):
        meet(place, tmp_path, timeout_s=0.2)
    late = Place(1, 2, 0, 1, node="node1", job="1.0.0", finds_others_by_slurm=True)
    with pytest.raises(NoMeeting, match=r"rank 0 did not say where it is within 0.2 s"):
        meet(late, tmp_path, timeout_s=0.2)
