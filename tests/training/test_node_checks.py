"""Before the first step: every fault names its node, and a group that does not answer is named."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_curr.errors import RecipeError
from tests.ranks import run_ranks
from tests.training.runs import Runs


def test_every_fault_names_its_node() -> None:
    from megatron_curr.training.node_checks import NodeReport, find_faults

    good = [
        NodeReport(
            node=f"node{n}",
            clock_s=1e9 + n / 10,
            sees_run_folder=True,
            free_bytes=1 << 40,
            write_bytes_per_s=1e8,
            disk_fault="",
            open_files=4096,
            versions={"torch": "2.13", "numpy": "2"},
            recipe="r",
            code="c",
        )
        for n in range(4)
    ]
    assert find_faults(good, needed_bytes=1 << 30) == []
    broken: dict[str, tuple[dict[str, object], str]] = {
        "clock": ({"clock_s": 1e9 - 60}, "its clock is -60 s off those of the others"),
        "run-folder": ({"sees_run_folder": False}, "not on a shared disk"),
        "checkpoints": ({"sees_checkpoints": False}, "the checkpoints/ there is another one"),
        "saves": ({"moves_fault": "[Errno 18] Invalid cross-device link"},
                  "a checkpoint cannot get to its place: [Errno 18]"),
        "open-files": ({"open_files": 256}, "may open 256 files, 1024 are needed"),
        "disk-speed": ({"write_bytes_per_s": 1e4}, "writes 9.77 KiB a second"),
        "disk": ({"disk_fault": "No space left on device"}, "cannot be written: No space left"),
        "gpu": ({"gpu_fault": "GPU 3 multiplies wrongly"}, "GPU 3 multiplies wrongly"),
        "node-local": ({"local_fault": "Read-only file system"},
                       "its own disk takes no checkpoint: Read-only file system; mend that, or "
                       "change node_local of the profile"),
        "versions": ({"versions": {"torch": "2.12", "numpy": "2"}}, "node2 against 3 others "
                     "(torch 2.12 there)"),
        "recipe": ({"recipe": "x"}, "the recipe differ"),
        "code": ({"code": "x"}, "start all ranks from one frozen copy"),
    }  # fmt: skip
    for check, (values, words) in broken.items():
        reports = [*good[:2], replace(good[2], **values), good[3]]  # type: ignore[arg-type]
        (fault,) = find_faults(reports, needed_bytes=1 << 30)
        assert (fault.check, fault.nodes) == (check, ("node2",))
        assert words in fault.detail
    (full,) = find_faults(good, needed_bytes=1 << 41)
    assert (full.check, full.nodes) == ("disk-space", ())
    assert "1 TiB free, two checkpoints need 2 TiB" in full.detail
    torn = [good[0], replace(good[1], recipe="x")]
    assert [fault.nodes for fault in find_faults(torn, needed_bytes=0)] == [()]  # who is right?


def test_a_folder_on_the_nodes_own_disk_is_found_by_the_nodes_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_curr.training.local_copy import local_folder

    monkeypatch.setenv("NODE_DISK", "/raid")
    assert local_folder("$NODE_DISK/${NODE_DISK}x/run-1") == Path("/raid//raidx/run-1")
    monkeypatch.delenv("NODE_DISK")
    with pytest.raises(RecipeError, match=r"node_local .*: \$NODE_DISK/run-1 is \$NODE_DISK/"):
        local_folder("$NODE_DISK/run-1")


def check_three_nodes(rank: int, recipes: list[str]) -> None:
    import torch.distributed as dist

    from megatron_curr.parallel.groups import build_groups
    from megatron_curr.recipe.load import load_recipe
    from megatron_curr.training.life import begin_life, join_life
    from megatron_curr.training.node_checks import BadNode, check_groups, check_nodes
    from megatron_curr.training.preflight import prepare

    prepared = prepare(load_recipe(recipes[rank]), 3)
    if rank == 0:
        life = begin_life(prepared.folder, world_size=3, node="node0")
        prepared.folder.checkpoints.mkdir()
    dist.barrier()
    if rank != 0:
        node = f"node{rank}"
        life = join_life(prepared.folder, 1, rank=rank, node=node, is_first_on_node=True)
    with pytest.raises(BadNode, match="the recipe differ between nodes: node2 against") as told:
        check_nodes(prepared, life)
    assert (told.value.cause, told.value.bad_nodes) == ("preflight:recipe", ("node2",))
    assert not list(life.pen.folder.glob("written-by-*"))

    groups = build_groups(prepared.recipe.parallel)
    check_groups(groups, life)
    if rank == 2:
        time.sleep(2.0)  # it does not come
    else:
        with pytest.raises(BadNode, match=r"data-parallel group of ranks 0, 1, 2 did not come"):
            check_groups(groups, life, limit_s=0.5)
    os._exit(0)  # no farewell: the group is broken


def test_a_node_with_another_recipe_and_a_group_without_an_answer_are_named(
    runs: Runs,
) -> None:
    batches = {"curriculum.phases.0.global_batch_tokens": 384,
               "curriculum.phases.1.global_batch_tokens": 384}  # fmt: skip
    recipe = runs.recipe("checked", batches)
    other = runs.recipe("differs", {**batches, "seed": 3,
                                    "run_folder": str(runs.folder / "checked")})  # fmt: skip
    run_ranks(check_three_nodes, 3, [str(recipe), str(recipe), str(other)])
    assert Path(runs.folder / "checked" / "incarnations").is_dir()


def test_the_moves_of_a_save_are_tried_and_taken_back(tmp_path: Path) -> None:
    from megatron_curr.incarnation.fence import Pen
    from megatron_curr.training.node_checks import try_moves
    from megatron_curr.training.run_folder import RunFolder

    folder, pen = RunFolder(tmp_path / "run"), Pen.beside(tmp_path / "run")
    folder.checkpoints.mkdir()
    before = sorted(folder.path.rglob("*"))
    assert try_moves(pen, pen, folder) == ""
    assert sorted(folder.path.rglob("*")) == before
    folder.checkpoints.rmdir()
    folder.checkpoints.touch()
    assert "Not a directory" in try_moves(pen, pen, folder)
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        folder.checkpoints.unlink()
        folder.checkpoints.symlink_to(elsewhere)
        assert "Invalid cross-device link" in try_moves(pen, pen, folder)
