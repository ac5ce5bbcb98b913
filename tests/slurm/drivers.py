"""What is done to the runs of ``test_survival``: each driver breaks a run on a real Slurm, its way.

A fault comes when its run is at a step, and where a quiet machine would be through before Slurm has
noticed, the ranks are stopped meanwhile.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.slurm.policy import Rules, excluded_nodes
from tests.slurm.cluster import Cluster, SlurmRun, wait_until
from tests.slurm.conftest import NODES, amended_curriculum
from tests.slurm.toy import toy_values, write_toy

_EXCLUDE_S = 20.0


@dataclass
class Story:
    """A run that is over, and how long it took from each fault to the next step."""

    run: SlurmRun
    recovery_s: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def recover(self, fault: str, number: int) -> None:
        """Wait for the start after a fault, and note the time."""
        self.recovery_s[fault] = round(self.run.wait_for_start(number), 1)
        print(json.dumps({"fault": fault, "recovery_s": self.recovery_s[fault]}), flush=True)


def only_on(*nodes: int) -> list[str]:
    """For sbatch: no other node, so that the faults of one run do not meet another."""
    others = (f"node{node}" for node in range(NODES) if node not in nodes)
    return [f"--exclude={','.join(others)}"]


def lose_nodes(cluster: Cluster, corpus: Path, folder: Path) -> Story:
    """Two nodes and a spare: a rank, the controller, a preemption, an amendment, a node, a link."""
    run = SlurmRun(
        cluster,
        write_toy(corpus, folder / "nodes"),
        partition="scavenge",
        spares=1,
        options=only_on(0, 1, 2, 5),
    )
    story = Story(run)
    run.submit("--until-done")
    run.wait_for_step(6)
    run.signal(1, 1, "KILL")
    story.recover("kill -9 of a rank", 2)

    run.wait_for_step(10)
    run.hold(2)  # else a quiet machine is through before the controller is back
    cluster("restart")
    amended = amended_curriculum(corpus, folder / "nodes")
    recipe = write_toy(corpus, folder / "nodes", curriculum=amended)
    story.facts["amend"] = cluster.command("amend", run.folder, recipe)
    run.let_go(2)
    run.wait_for_step(18)
    run.hold(2)
    boss = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null"]
    node, _ = run.rank(2, 1)
    cluster("exec", *boss, f"--nodelist=node{node}", "--wrap=sleep 1")
    # A preemption wakes them up: its warning comes with a SIGCONT, as that of the time limit does.
    story.recover("preemption", 3)

    run.wait_for_step(26)
    pen = run.start_of(3).pen  # type: ignore[union-attr]
    node, _ = run.rank(3, 1)
    wait_until(lambda: _is_saving(pen), "a save to begin")
    cluster("poweroff", node)
    story.recover("power-off in a save, spare held", 4)
    run.hold(4)
    cluster("boot", node)
    cluster.wait_for_node(node, "idle")
    run.let_go(4)

    run.wait_for_step(44)
    node, _ = run.rank(4, 0)  # with the batch script
    cluster("cut", node)
    story.recover("network cut", 5)
    cluster("heal", node)
    run.wait_for_end()
    return story


def run_out_of_time_and_leave_a_zombie(cluster: Cluster, corpus: Path, folder: Path) -> Story:
    """One node of two, two ranks: the time limit, then a slurmd that dies without its ranks.

    Ranks that are stopped take no step while Slurm is slow; after they go on they have no way to
    know what happened meanwhile but the run folder.
    """
    run = SlurmRun(
        cluster,
        write_toy(corpus, folder / "slices"),
        nodes=1,
        ranks_per_node=2,
        options=only_on(3, 4),
    )
    story = Story(run)
    run.submit("--until-done")
    run.wait_for_step(8)
    warned = run.newest
    run.hold(warned)
    shorten_time_limit(cluster, run.events[-1]["job_id"])
    # Slurm's early warning wakes them up: it comes with a SIGCONT.
    story.recover("time limit", warned + 1)

    run.wait_for_step(24)
    stale = run.newest
    node = run.hold(stale)
    cluster("crash", node)
    story.recover("slurmd killed, ranks live on", stale + 1)
    run.let_go(stale)
    zombie = run.start_of(stale)
    assert zombie is not None
    wait_until(lambda: len(zombie.endings) == 2, "the stale ranks to end")
    story.facts |= {"warned": warned, "stale": stale}
    story.facts["last words"] = [ending.cause for ending in zombie.endings]
    run.wait_for_end()
    cluster("respawn", node)
    return story


def shorten_time_limit(cluster: Cluster, job_id: str) -> None:
    """To one or two minutes from now: the warning of 60 s before the end is due within a minute."""
    text = cluster("exec", "scontrol", "show", "job", job_id, "--oneliner")
    hours, minutes = re.findall(r"RunTime=(\d+):(\d+):", text)[0]
    limit = 60 * int(hours) + int(minutes) + 2
    cluster("exec", "scontrol", "update", f"jobid={job_id}", f"TimeLimit={limit}")


def _is_saving(pen: Path) -> bool:
    """Whether a checkpoint grows in the pen, and has files already."""
    try:
        return any(any(grown.iterdir()) for grown in pen.iterdir() if grown.name.startswith("step"))
    except OSError:  # it has just been published
        return False


def run_on_all_nodes_then_on_half(cluster: Cluster, corpus: Path, folder: Path) -> Story:
    """Two nodes by two ranks, cancelled, and submitted again on one node."""
    recipe = write_toy(corpus, folder / "widths")
    run = SlurmRun(cluster, recipe, ranks_per_node=2, options=only_on(9, 10))
    story = Story(run)
    job_id = run.submit()
    run.wait_for_step(12)
    cluster("exec", "scancel", job_id)
    wait_until(lambda: cluster.state_of(job_id) == "CANCELLED", "the job to go")
    time.sleep(1)
    run.submit("--nodes", 1)
    story.recover("scancel, submitted on half the nodes", 2)
    run.wait_for_end()
    return story


def go_back_into_the_queue(cluster: Cluster, corpus: Path, folder: Path) -> Story:
    """One node, two ranks, at a site that wants one job requeued: a preemption."""
    run = SlurmRun(
        cluster,
        write_toy(corpus, folder / "requeued"),
        nodes=1,
        ranks_per_node=2,
        partition="scavenge",
        chain={"by": "requeue"},
        options=only_on(6),
    )
    story = Story(run)
    run.submit("--until-done")
    run.wait_for_step(12)
    run.hold(1)
    boss = ["sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null"]
    cluster("exec", *boss, "--nodelist=node6", "--wrap=sleep 1")
    story.recover("preemption, chain by requeue", 2)
    run.wait_for_end()
    return story


def by_own_disks(cluster: Cluster) -> dict[str, Any]:
    """Of a profile: checkpoints go through ``local/nodeI/copies``, which a node sees as its own."""
    disk = cluster.folder / "local" / "this"
    return {
        "environment": {"OMP_NUM_THREADS": "1", "NODE_DISK": str(disk)},
        "node_local": "$NODE_DISK/copies",
    }


def lose_disks_then_diverge(cluster: Cluster, corpus: Path, folder: Path) -> Story:
    """Two nodes of two whose own disks fail, one after the other; mended, a rate that diverges."""
    curriculum = toy_values(corpus, folder / "hopeless")["curriculum"]
    short, mixed = curriculum["phases"]
    short["tokens"] = 17 * 1024  # checkpoints at steps 8 and 16
    mixed["learning_rate"] = 1e30  # of step 18; the loss of 19 and 20 is not finite
    recipe = write_toy(
        corpus,
        folder / "hopeless",
        curriculum=curriculum,
        training={"precision": "fp32", "max_nonfinite_steps": 2},
    )
    run = SlurmRun(
        cluster,
        recipe,
        nodes=1,
        chain={"max_fruitless": 2, "exclude_hours": _EXCLUDE_S / 3600},
        options=only_on(7, 8),
        **by_own_disks(cluster),
    )
    story = Story(run)
    disks = {f"node{node}": cluster.folder / "local" / f"node{node}" / "copies" for node in (7, 8)}
    for disk in disks.values():
        disk.touch()
    run.submit("--until-done")
    story.facts["disks"] = run.stopped()
    for disk in disks.values():
        disk.unlink()
    rules = Rules(max_fruitless=2, exclude_s=_EXCLUDE_S)
    wait_until(lambda: not excluded_nodes(run.records, rules, now_s=time.time()), "the ban's end")
    run.submit("--until-done")
    story.facts["diverged"] = run.stopped()
    (story.facts["copies"],) = disks[run.records[-1].nodes[0]].iterdir()
    return story
