"""Checks of every node before the first step: a bad one is named, and costs seconds, not a hang.

Every node says what it has (``NodeReport``); all ranks compare the same reports and come to the
same verdict (``find_faults``). Then every group of ranks does one small collective with a limit.
"""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_curr.incarnation.fence import Pen
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.load import dump_recipe
from megatron_curr.training.checkpoint_folder import STATE
from megatron_curr.training.life import Life, RunFailed
from megatron_curr.training.local_copy import local_fault
from megatron_curr.training.preflight import Prepared
from megatron_curr.training.room import Room, needed_bytes
from megatron_curr.training.run import library_versions
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.units import format_bytes, format_duration

log = logging.getLogger(__name__)

MOST_CLOCK_SKEW_S = 5.0
LEAST_WRITE_BYTES_PER_S = 2 << 20
LEAST_OPEN_FILES = 1024
COLLECTIVE_LIMIT_S = 30.0
_WRITTEN_BYTES = 4 << 20
_PACKAGES = ("megatron_curr", "launch")


class BadNode(RunFailed):
    """A node failed its checks."""

    def __init__(self, check: str, text: str, *, bad_nodes: tuple[str, ...] = ()) -> None:
        super().__init__(text, bad_nodes=bad_nodes)
        self.cause = f"preflight:{check}"


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What one node has; made by its first rank."""

    node: str
    clock_s: float  # Unix time, at an instant common to all nodes
    sees_run_folder: bool
    free_bytes: int
    write_bytes_per_s: float
    disk_fault: str  # what the file system said
    open_files: int
    versions: Mapping[str, str]
    recipe: str  # fingerprints
    code: str
    sees_checkpoints: bool = True
    moves_fault: str = ""  # of what a save renames and replaces, tried by rank 0
    gpu_fault: str = ""
    local_fault: str = ""  # of the disk through which checkpoints go


@dataclass(frozen=True)
class Fault:
    """Something wrong with nodes; ``nodes`` is empty where it is the fault of all."""

    check: str
    nodes: tuple[str, ...]
    detail: str


def check_nodes(prepared: Prepared, life: Life, *, node_local: Path | None = None) -> None:
    """Compare all nodes. Collective; raises ``BadNode`` on every rank."""
    began_s = time.monotonic()
    token = [os.urandom(8).hex()]
    dist.broadcast_object_list(token, src=0)
    pens, moves_fault = (life.pen, life.checkpoint_pen), ""
    if life.rank == 0:
        for pen in pens:
            (pen.folder / token[0]).touch()
        moves_fault = try_moves(life.pen, life.checkpoint_pen, prepared.folder)
    dist.barrier()
    clock_s = time.time()
    report = None
    if life.is_first_on_node:
        report = NodeReport(
            node=life.node,
            clock_s=clock_s,
            sees_run_folder=(life.pen.folder / token[0]).exists(),
            sees_checkpoints=(life.checkpoint_pen.folder / token[0]).exists(),
            moves_fault=moves_fault,
            **_disk(life.checkpoint_pen.folder, life.node),
            open_files=_open_files(),
            versions=library_versions(),
            recipe=_digest([dump_recipe(prepared.recipe).encode()]),
            code=code_fingerprint(),
            gpu_fault=_gpu_fault(),
            local_fault=local_fault(node_local) if node_local else "",
        )
    told: list[NodeReport | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, report)
    reports = [report for report in told if report is not None]
    faults = find_faults(reports, needed_bytes=needed_bytes(prepared))
    for fault in faults:
        log.error("preflight: %s", fault.detail)
    if faults:
        nodes = tuple(sorted({node for fault in faults for node in fault.nodes}))
        text = "the check before the first step failed: " + "; ".join(f.detail for f in faults)
        raise BadNode(faults[0].check, text, bad_nodes=nodes)
    log.info(
        "preflight: %d nodes checked in %s; the run folder has %s free and takes %s a second",
        len(reports),
        format_duration(time.monotonic() - began_s),
        format_bytes(reports[0].free_bytes),
        format_bytes(min(report.write_bytes_per_s for report in reports)),
    )


def find_faults(reports: Sequence[NodeReport], *, needed_bytes: int) -> list[Fault]:
    """What is wrong, with the nodes that differ from most. Pure."""
    faults: list[Fault] = []
    noon_s = median(report.clock_s for report in reports)
    for report in reports:
        node, skew_s = report.node, report.clock_s - noon_s

        def add(check: str, detail: str, node: str = node) -> None:
            faults.append(Fault(check, (node,), f"{node}: {detail}"))

        if not report.sees_run_folder:
            add("run-folder", "the run folder there is another one, not on a shared disk; set "
                "run_folder to a disk that all nodes see")  # fmt: skip
        elif not report.sees_checkpoints:
            add("checkpoints", "the checkpoints/ there is another one; let the link or mount lead "
                "to a disk that all nodes see")  # fmt: skip
        if report.moves_fault:
            add("saves", f"a checkpoint cannot get to its place: {report.moves_fault}")
        if abs(skew_s) > MOST_CLOCK_SKEW_S:
            add("clock", f"its clock is {skew_s:+.0f} s off those of the others; set it by NTP")
        if report.open_files < LEAST_OPEN_FILES:
            add("open-files", f"a process may open {report.open_files} files, {LEAST_OPEN_FILES} "
                "are needed; raise ulimit -n")  # fmt: skip
        if report.disk_fault:
            add("disk", f"the run folder cannot be written: {report.disk_fault}")
        elif report.write_bytes_per_s < LEAST_WRITE_BYTES_PER_S:
            add("disk-speed", f"writes {format_bytes(report.write_bytes_per_s)} a second into the "
                f"run folder; {format_bytes(LEAST_WRITE_BYTES_PER_S)} is the least")  # fmt: skip
        if report.gpu_fault:
            add("gpu", report.gpu_fault)
        if report.local_fault:
            add("node-local", f"its own disk takes no checkpoint: {report.local_fault}; mend that, "
                "or change node_local of the profile")  # fmt: skip
    room = Room(needed_bytes, min(report.free_bytes for report in reports))
    if room.fault:
        faults.append(Fault("disk-space", (), room.fault))
    for check, values in (
        ("versions", [tuple(map(" ".join, sorted(r.versions.items()))) for r in reports]),
        ("recipe", [(report.recipe,) for report in reports]),
        ("code", [(report.code,) for report in reports]),
    ):
        faults += _odd_ones_out(check, [report.node for report in reports], values)
    return faults


def _odd_ones_out(
    check: str, nodes: Sequence[str], values: Sequence[tuple[str, ...]]
) -> list[Fault]:
    (usual, count), *others = Counter(values).most_common()
    if not others:
        return []
    odd = tuple(node for node, value in zip(nodes, values, strict=True) if value != usual)
    what = {"versions": "library versions", "recipe": "the recipe", "code": "the code"}[check]
    detail = f"{what} differ between nodes: {', '.join(odd)} against {count} others"
    if check == "versions":
        theirs = next(value for value in values if value != usual)
        detail += f" ({'; '.join(sorted(set(theirs) - set(usual)))} there)"
    detail += "; start all ranks from one frozen copy"
    return [Fault(check, odd if 2 * len(odd) < len(nodes) else (), detail)]


def check_groups(groups: Groups, life: Life, *, limit_s: float = COLLECTIVE_LIMIT_S) -> None:
    """One small all-reduce in every group of every axis. Raises ``BadNode`` naming the group."""
    known = groups.pg_collection
    axes = {"tensor": known.tp, "pipeline": known.pp, "context": known.cp, "data": known.dp,
            "expert": known.ep, "world": dist.group.WORLD}  # fmt: skip
    for axis, group in axes.items():
        size = dist.get_world_size(group)
        if size == 1:
            continue
        value = torch.ones(1, device=groups.device)
        ranks = dist.get_process_group_ranks(group)
        who = f"the {axis}-parallel group of ranks {', '.join(map(str, ranks))}"
        try:
            work = dist.all_reduce(value, group=group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=limit_s))
        except RuntimeError as error:
            raise BadNode(
                f"{axis}-group",
                f"{who} did not come through a first all-reduce within {limit_s:g} s (seen by rank "
                f"{life.rank} on {life.node}: {str(error).splitlines()[0]})",
            ) from error
        if float(value) != size:
            raise BadNode(f"{axis}-group", f"{who}: an all-reduce of ones gave {float(value)}")


def code_fingerprint() -> str:
    """SHA-256 of the Python files that run here."""
    root = Path(__file__).parents[2]
    files = sorted(file for package in _PACKAGES for file in (root / package).rglob("*.py"))
    return _digest([file.read_bytes() for file in files])


def _digest(parts: Sequence[bytes]) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def try_moves(pen: Pen, checkpoint_pen: Pen, folder: RunFolder) -> str:
    """Make the moves of a save, as rank 0 will, and take them back; why that cannot be."""
    target, mark = folder.checkpoints / "trial", folder.checkpoints / "trial.txt"
    try:
        pen.write(folder.path / mark.name, "")
        (folder.path / mark.name).unlink()
        grown = checkpoint_pen.make(target.name)
        (grown / STATE).write_text("{}", encoding="utf-8")
        checkpoint_pen.put(grown, target)
        checkpoint_pen.write(mark, "")
        mark.unlink()
        checkpoint_pen.remove(target)
    except OSError as error:
        return str(error)
    return ""


def _disk(folder: Path, node: str) -> dict[str, Any]:
    """Free bytes, and how fast this node writes, or why it does not."""
    file = folder / f"written-by-{node}"
    block = os.urandom(_WRITTEN_BYTES)
    speed, fault, began_s = 0.0, "", time.monotonic()
    try:
        with file.open("wb") as stream:
            stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        speed = _WRITTEN_BYTES / (time.monotonic() - began_s)
    except OSError as error:
        fault = str(error)
    finally:
        file.unlink(missing_ok=True)
    room = os.statvfs(folder) if folder.is_dir() else None
    free_bytes = room.f_bavail * room.f_frsize if room else 0
    return {"free_bytes": free_bytes, "write_bytes_per_s": speed, "disk_fault": fault}


def _open_files() -> int:
    """How many files a process may open, raised as far as the system lets us."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 30


def _gpu_fault() -> str:
    """A product of matrices that comes out wrong on any GPU of the node, or an error there."""
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            ones = torch.ones(512, 512, device=f"cuda:{index}")
            if not bool((ones @ ones == 512).all()):
                return f"GPU {index} multiplies wrongly"
    except RuntimeError as error:
        return f"a GPU fails: {str(error).splitlines()[0]}"
    return ""
