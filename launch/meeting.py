"""How the ranks of a job meet: in a file, where torchrun says, or by Slurm's variables."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_curr.durable import write_durably

if TYPE_CHECKING:
    from torch.distributed import TCPStore

MEETING_S = 300.0
_POLL_S = 0.1


@dataclass(frozen=True)
class Place:
    """Where this rank stands among the others."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: str = socket.gethostname()
    job: str | None = None  # the Slurm job, its restart and its step, one for every launch
    finds_others_by_slurm: bool = False

    @classmethod
    def from_environment(
        cls, environment: Mapping[str, str] = os.environ, *, launcher: str | None = None
    ) -> Place:
        """As ``srun`` or torchrun describes it; one rank alone where nothing does.

        ``launcher`` says who is to be believed, for what else is there may be of elsewhere. Without
        it a torchrun that srun has started speaks last, and a RANK of nobody known is believed
        outside a Slurm step only. A batch script has no step and is no rank.
        """

        def number(name: str, default: int) -> int:
            return int(environment.get(name, default))

        node = environment.get("SLURMD_NODENAME") or socket.gethostname()
        job = None
        if "SLURM_JOB_ID" in environment:
            restart, step = number("SLURM_RESTART_COUNT", 0), environment.get("SLURM_STEP_ID", "")
            job = f"{environment['SLURM_JOB_ID']}.{restart}.{step}"
        has_ranks = {"RANK", "TORCHELASTIC_RUN_ID"} <= environment.keys()
        by_slurm = "SLURM_STEP_ID" in environment and not has_ranks
        if not (by_slurm if launcher is None else launcher == "srun"):
            world_size = number("WORLD_SIZE", 1)
            rank, local_rank = number("RANK", 0), number("LOCAL_RANK", 0)
            local_world_size = number("LOCAL_WORLD_SIZE", world_size)
            return cls(rank, world_size, local_rank, local_world_size, node, job)
        world_size = number("SLURM_STEP_NUM_TASKS", number("SLURM_NTASKS", 1))
        counts = expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
        return cls(
            rank=number("SLURM_PROCID", 0),
            world_size=world_size,
            local_rank=number("SLURM_LOCALID", 0),
            local_world_size=counts[min(number("SLURM_NODEID", 0), len(counts) - 1)],
            node=node,
            job=job,
            finds_others_by_slurm=True,
        )

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"rank {self.rank} of {self.world_size}, pid {os.getpid()} on {self.node}{job}"


def join(place: Place, rendezvous: str | None, *, meeting_folder: Path | None = None) -> None:
    """Meet the other ranks: in a file when we started them, else where torchrun or Slurm says.

    ``meeting_folder`` is on a disk that all nodes see; needed for ranks that Slurm started.
    Raises ``NoMeeting`` that names who did not come.
    """
    import torch
    import torch.distributed as dist

    backend = "gloo"
    if torch.cuda.is_available():
        # One device alone is this rank's own: Slurm may hide the others from it.
        torch.cuda.set_device(place.local_rank if torch.cuda.device_count() > 1 else 0)
        backend = "cpu:gloo,cuda:nccl"
    where: dict[str, Any] = {"rank": place.rank, "world_size": place.world_size}
    alone = place.world_size == 1 and "MASTER_ADDR" not in os.environ
    if rendezvous is None and alone:
        where["store"] = dist.HashStore()
    elif rendezvous is None and place.finds_others_by_slurm:
        assert meeting_folder is not None, "ranks that Slurm starts meet in the run folder"
        where["store"] = meet(place, meeting_folder, timeout_s=MEETING_S)
    else:
        where["init_method"] = rendezvous or "env://"
    dist.init_process_group(backend, **where)


def meet(place: Place, folder: Path, *, timeout_s: float) -> TCPStore:
    """A store that all ranks share: rank 0 opens a port and says in a file where it is.

    The port is free, since the system chose it; the file's name is that of this launch, so that
    ranks of an earlier one are never met. Raises ``NoMeeting``.
    """
    from torch.distributed import TCPStore

    from megatron_curr.training.life import NoMeeting

    file = folder / f"meeting-{place.job}.json"
    timeout = timedelta(seconds=timeout_s)
    if place.rank == 0:
        address = address_of_this_node(os.environ.get("SLURM_LAUNCH_NODE_IPADDR"))
        store = TCPStore(
            address, 0, place.world_size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        where = {"address": address, "port": store.port, "node": place.node}
        write_durably(file, json.dumps(where) + "\n")
        try:
            _wait_for_all(store, place, folder, timeout_s)
        finally:
            file.unlink(missing_ok=True)
        return store
    until_s = time.monotonic() + timeout_s
    while not file.exists():
        if time.monotonic() > until_s:
            raise NoMeeting(f"rank 0 did not say where it is within {timeout_s:g} s ({file})")
        time.sleep(_POLL_S)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # a network file system looks anew at what it took for missing
    where = json.loads(file.read_text(encoding="utf-8"))
    store = TCPStore(
        where["address"], where["port"], place.world_size, is_master=False, timeout=timeout
    )
    store.set(f"here/{place.rank}", place.node)
    store.wait(["all-here"], timeout)
    return store


def excuse(place: Place, folder: Path, error: Exception) -> None:
    """Tell rank 0 why this rank will not come, so that nobody waits for it."""
    told = {"rank": place.rank, "node": place.node, "text": str(error)}
    folder.mkdir(parents=True, exist_ok=True)
    write_durably(folder / f"excuse-{place.job}.{place.rank}.json", json.dumps(told) + "\n")


def _wait_for_all(store: TCPStore, place: Place, folder: Path, timeout_s: float) -> None:
    """On rank 0: until every rank has come, one has said that it will not, or the time is up."""
    from megatron_curr.training.life import NoMeeting

    until_s = time.monotonic() + timeout_s
    missing = set(range(1, place.world_size))
    while missing and time.monotonic() < until_s:
        missing -= {rank for rank in missing if store.check([f"here/{rank}"])}
        time.sleep(_POLL_S if missing else 0.0)
        excuses = [json.loads(p.read_text()) for p in folder.glob(f"excuse-{place.job}.*.json")]
        if excuses:
            nodes = sorted({str(told["node"]) for told in excuses})
            first = min(excuses, key=lambda told: told["rank"])
            all_nodes = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
            raise NoMeeting(
                f"rank {first['rank']} on {first['node']} cannot start, rank 0 on {place.node} "
                f"can: {first['text']}",
                bad_nodes=tuple(nodes) if 2 * len(nodes) < len(all_nodes) else (),
            )
    if missing:
        nodes = expand_nodes(os.environ.get("SLURM_STEP_NODELIST", ""))
        came = set(range(1, place.world_size)) - missing
        present = {place.node, *(store.get(f"here/{rank}").decode() for rank in came)}
        absent = tuple(node for node in nodes if node not in present)
        listed = ", ".join(map(str, sorted(missing)[:8])) + (" ..." if len(missing) > 8 else "")
        raise NoMeeting(
            f"{len(missing)} of {place.world_size} ranks did not come within {timeout_s:g} s: "
            f"{listed}" + (f"; no rank of {', '.join(absent)} came" if absent else ""),
            bad_nodes=absent if 2 * len(absent) < len(nodes) else (),
        )
    store.set("all-here", "1")


def address_of_this_node(peer: str | None) -> str:
    """The address under which others reach this node: that of the way to a peer, here srun."""
    if peer:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))  # sends nothing: only the routing table is asked
            return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())


def expand_nodes(text: str) -> list[str]:
    """``node[0-2,7],login`` in Slurm's shorthand, as names in order."""
    names = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names += _expand_part(part)
    return names


def _expand_part(part: str) -> list[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if match is None:
        return [part]
    head, inside, tail = match.groups()
    numbers = []
    for span in inside.split(","):
        first, _, last = span.partition("-")
        numbers += [f"{n:0{len(first)}d}" for n in range(int(first), int(last or first) + 1)]
    return [head + number + rest for number in numbers for rest in _expand_part(tail)]


def expand_counts(text: str) -> list[int]:
    """``2(x3),1``, Slurm's shorthand for tasks by node, as numbers."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts or [1]
