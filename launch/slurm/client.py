"""Slurm's commands, and what they answer, as data. Nothing else in the package calls them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.environment import for_commands, for_job
from megatron_curr.errors import UserError

_ANSWER_WITHIN_S = 60.0
_UNUSABLE = ("down", "drain", "fail", "maint", "unknown", "*")


class SlurmError(UserError):
    """Slurm cannot be reached, or refuses what it was asked for."""


@dataclass(frozen=True)
class Job:
    """A job as ``squeue`` lists it."""

    job_id: str
    state: str
    reason: str
    nodes: str
    end_time: str


def ask(*command: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises ``SlurmError`` with its own words."""
    if shutil.which(command[0]) is None:
        raise SlurmError(
            f"{command[0]} is not on the PATH; run this on a login node of the cluster, "
            "or load the module that brings Slurm"
        )
    try:
        done = subprocess.run(
            command,
            env=for_commands(os.environ) if environment is None else environment,
            capture_output=True,
            text=True,
            timeout=_ANSWER_WITHIN_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{command[0]} did not answer within {_ANSWER_WITHIN_S:.0f} s; is slurmctld up?"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command[:2])}: {said}")
    return done.stdout


def submit(script: Path, *options: str, inherit: Sequence[str]) -> str:
    """Submit a script; the job's id. Of this environment the job gets little, and ``inherit``."""
    # sbatch hands on all that it has; a site's SBATCH_EXPORT or a script's --export is not asked.
    command = ("sbatch", "--parsable", "--export=ALL", *options, str(script))
    return ask(*command, environment=for_job(os.environ, inherit)).strip().partition(";")[0]


def jobs_named(name: str) -> list[Job]:
    """Jobs of this name that wait or run."""
    text = ask("squeue", "--noheader", f"--name={name}", "--format=%i|%T|%r|%N|%e")
    return [Job(*line.split("|", 4)) for line in text.splitlines() if line]


def cancel_waiting(name: str) -> None:
    """Cancel the jobs of this name that have not begun."""
    ask("scancel", "--state=PENDING", f"--name={name}")


def exclude_nodes(job_id: str, nodes: Sequence[str]) -> None:
    """Keep a waiting job off these nodes; an empty list takes all back."""
    ask("scontrol", "update", f"jobid={job_id}", f"ExcNodeList={','.join(nodes)}")


def requeue(job_id: str) -> None:
    """Put a job, whose script this may be, back into the queue."""
    ask("scontrol", "requeue", job_id)


def fields_of(kind: str, name: str) -> dict[str, str]:
    """``scontrol show KIND NAME`` as a mapping; empty where Slurm does not know it."""
    try:
        text = ask("scontrol", "show", kind, name, "--oneliner")
    except SlurmError as error:
        if re.search("invalid|not found", str(error), re.IGNORECASE):
            return {}
        raise
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def hostnames(node_list: str) -> list[str]:
    """``node[0-2]`` as names."""
    return ask("scontrol", "show", "hostnames", node_list).split() if node_list else []


def address_of(node: str) -> str:
    """Where a node can be reached: its name need not resolve."""
    return fields_of("node", node).get("NodeAddr") or node


def usable_nodes(*, partition: str | None = None) -> set[str]:
    """Nodes that can take work, now or when their work is done."""
    where = [f"--partition={partition}"] if partition else []
    text = ask("sinfo", "--noheader", "--Node", *where, "--format=%N %t")
    states = dict(line.split(maxsplit=1) for line in text.splitlines() if line)
    return {name for name, state in states.items() if not any(bad in state for bad in _UNUSABLE)}


def partitions() -> list[str]:
    """Names of the cluster's partitions."""
    return list(dict.fromkeys(ask("sinfo", "--noheader", "--format=%R").split()))


def switch_of_nodes() -> dict[str, str]:
    """The leaf switch of every node; empty where the site did not tell Slurm of any."""
    try:
        text = ask("scontrol", "show", "topology")
    except SlurmError:
        return {}
    found = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(\S+?)=(\S*)", line))
        if values.get("Level") == "0":
            found.update({node: values["SwitchName"] for node in hostnames(values["Nodes"])})
    return found
