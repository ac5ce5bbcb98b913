"""A cluster of the tests' own, runs on it, and hands to break both with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from launch.slurm.submission import events, submissions
from megatron_curr.incarnation.record import Incarnation, Record, incarnations
from tests.training.runs import rows

ROOT = Path(__file__).parents[2]
TESTCLUSTER = ROOT / "slurm" / "testcluster"
IS_HERE = (
    shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") is not None
    and os.geteuid() == 0
)
_PATIENCE_S = 240.0
# Of the shell in which everything is typed: what others left there, and a site's own wishes. None
# of it may reach a job or change what Slurm's commands print.
_SHELL = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "TORCHELASTIC_RUN_ID": "elsewhere",
    "MASTER_ADDR": "nowhere.invalid",
    "GLOO_SOCKET_IFNAME": "ib7",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_PROC_BIND": "true",
    "BASH_ENV": "/dev/null/missing",
    "LC_ALL": "xx_XX",
    "PYTHONPATH": f"/nowhere:{ROOT}",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_TIMELIMIT": "1",
    "SRUN_CPUS_PER_TASK": "64",
    "SLURM_NTASKS": "64",
    "SLURM_HINT": "nomultithread",
    "SLURM_TIME_FORMAT": "relative",
    "SQUEUE_FORMAT": "%i",
    "SINFO_FORMAT": "%N",
}
_PROFILE = {
    "name": "testcluster",
    "partition": "batch",
    "nodes": 2,
    "ranks_per_node": 1,
    "gpus": "none",
    "exclusive": False,
    "time_limit": "00:10:00",
    "signal_before_end_s": 60,
    "signal_slack_s": 0,
    "python": sys.executable,
    "environment": {"OMP_NUM_THREADS": "1"},
}


class Cluster:
    """``slurm/testcluster`` in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "TESTCLUSTER": str(folder), "PYTHONPATH": str(ROOT)}

    def __call__(self, verb: str, *words: object) -> str:
        """One verb of the script; its standard output, and where it fails all that it prints."""
        command = [str(TESTCLUSTER), verb, *map(str, words)]
        done = subprocess.run(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise CommandError(done.returncode, done.stdout + done.stderr)
        return done.stdout

    def command(self, *words: object) -> str:
        """``megatron-curr`` as a user types it on the login node."""
        shell = ("env", *(f"{name}={value}" for name, value in _SHELL.items()))
        return self("exec", *shell, sys.executable, "-m", "megatron_curr", *words)

    def state_of(self, job_id: str) -> str:
        """A job's state, as ``scontrol`` says it."""
        text = self("exec", "scontrol", "show", "job", job_id, "--oneliner")
        return re.findall(r"JobState=(\w+)", text)[0]

    def wait_for_node(self, node: int, state: str) -> None:
        """Until ``sinfo`` shows the node in this state."""
        wait_until(
            lambda: (
                set(self("exec", "sinfo", "-h", "-n", f"node{node}", "-o", "%T").split()) == {state}
            ),
            f"node{node} to be {state}",
        )


class CommandError(Exception):
    """A command ended with another exit code than 0."""

    def __init__(self, code: int, output: str) -> None:
        super().__init__(f"exit code {code}: {output}")
        self.code, self.output = code, output


def wait_until(condition: Callable[[], bool], what: str) -> float:
    """Wait for something; the seconds it took."""
    began_s = time.monotonic()
    while not condition():
        assert time.monotonic() < began_s + _PATIENCE_S, f"waited in vain for {what}"
        time.sleep(0.02)
    return time.monotonic() - began_s


class SlurmRun:
    """A run submitted to the cluster."""

    def __init__(self, cluster: Cluster, recipe: Path, **profile: Any) -> None:
        self.cluster, self.recipe = cluster, recipe
        self.folder = Path(yaml.safe_load(recipe.read_text())["run_folder"])
        self.profile = recipe.with_name(f"{recipe.stem}-profile.yaml")
        self.profile.write_text(yaml.safe_dump({**_PROFILE, **profile}))

    def submit(self, *options: object) -> str:
        """Submit it; the job's id."""
        words = (self.recipe, "--profile", self.profile, "--json", *options)
        return str(json.loads(self.cluster.command("submit", *words))["job_id"])

    @property
    def records(self) -> list[Record]:
        """How every start ended that has."""
        return [record for i in incarnations(self.folder) if (record := i.record)]

    @property
    def events(self) -> list[dict[str, Any]]:
        """What the chain did."""
        return events(self.folder)

    @property
    def step(self) -> int:
        """The last step in the metrics."""
        try:
            return int(rows(self.folder)[-1]["step"])
        except (OSError, IndexError, ValueError):
            return 0

    @property
    def newest(self) -> int:
        """The number of the last start."""
        return incarnations(self.folder)[-1].number

    def start_of(self, number: int) -> Incarnation | None:
        """The incarnation of this number, once ranks have begun to train in it."""
        known = {i.number: i for i in incarnations(self.folder)}
        found = known.get(number)
        return found if found is not None and found.beat is not None else None

    def wait_for_start(self, number: int) -> float:
        """Until incarnation ``number`` trains."""
        return self._wait(lambda: self.start_of(number) is not None, f"start {number}")

    def wait_for_step(self, step: int) -> float:
        """Until the metrics hold this step."""
        return self._wait(lambda: self.step >= step, f"step {step}")

    def wait_for_end(self) -> float:
        """Until the chain says that it is over."""
        return self._wait(lambda: bool(self.events) and self.events[-1]["what"] == "stop", "end")

    def stopped(self) -> dict[str, Any]:
        """What ``status`` says of it when the chain is over and its last job has gone."""
        self.wait_for_end()
        name = submissions(self.folder)[-1].name
        self._wait(lambda: not self.cluster("exec", "squeue", "-h", "-n", name).strip(), "job")
        status: dict[str, Any] = json.loads(self.cluster.command("status", self.folder, "--json"))
        return status

    def rank(self, number: int, rank: int) -> tuple[int, int]:
        """(node, process id there) of a rank of an incarnation, from the head of its log."""
        log = self.folder / "logs" / f"{number:04d}" / f"rank_{rank}.log"
        pattern = r"pid (\d+) on node(\d+)"
        self._wait(lambda: log.exists() and bool(re.search(pattern, log.read_text())), "a log")
        found = re.search(pattern, log.read_text())
        assert found is not None
        return int(found[2]), int(found[1])

    def signal(self, number: int, rank: int, name: str) -> int:
        """Send a rank a signal; the node it is on."""
        node, pid = self.rank(number, rank)
        self.cluster("on", node, "kill", f"-{name}", pid)
        return node

    def hold(self, number: int) -> int:
        """Stop both ranks of an incarnation where they are; the node of the last."""
        return [self.signal(number, rank, "STOP") for rank in (0, 1)][-1]

    def let_go(self, number: int) -> None:
        """Let them go on."""
        for rank in (0, 1):
            self.signal(number, rank, "CONT")

    def output(self) -> str:
        """What all jobs printed."""
        logs = sorted((self.folder / "logs").glob("slurm-*.out"))
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def _wait(self, condition: Callable[[], bool], what: str) -> float:
        try:
            return wait_until(condition, f"{what} of {self.folder.name}")
        except AssertionError as error:
            told = "\n".join(map(str, self.events))
            raise AssertionError(f"{error}\n{told}\n{self.output()[-6000:]}") from None
