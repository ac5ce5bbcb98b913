"""Runs on a real Slurm, broken in every way it knows; each must be the run that nothing broke.

Three runs go on side by side, since most of the time is spent waiting for Slurm to notice. What a
run went through is written down by its driver and judged by the tests.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_curr.curriculum.ledger import ledger_schedule, read_ledger
from tests.slurm.cluster import Cluster, SlurmRun, wait_until
from tests.slurm.conftest import amended_curriculum
from tests.slurm.toy import STEPS, write_toy
from tests.training.runs import rows

Rows = list[dict[str, Any]]


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


@pytest.fixture(scope="module")
def stories(
    cluster: Cluster, corpus: Path, folder: Path, undisturbed: Rows, undisturbed_amended: Rows
) -> Iterator[dict[str, Future[Story]]]:
    """The drivers, at work; the references come first, as they are quick."""
    drivers: dict[str, Callable[[Cluster, Path, Path], Story]] = {
        "nodes": lose_nodes,
        "slices": run_out_of_time_and_leave_a_zombie,
        "widths": run_on_all_nodes_then_on_half,
    }
    with ThreadPoolExecutor(len(drivers)) as pool:
        yield {name: pool.submit(drive, cluster, corpus, folder) for name, drive in drivers.items()}


def lose_nodes(cluster: Cluster, corpus: Path, folder: Path) -> Story:
    """Two nodes and a spare: a rank, the controller, a preemption, an amendment, a node, a link."""
    run = SlurmRun(
        cluster,
        write_toy(corpus, folder / "nodes"),
        partition="scavenge",
        spares=1,
        options=["--exclude=node3,node4"],
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
        options=["--exclude=node0,node1,node2"],
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
    run = SlurmRun(cluster, write_toy(corpus, folder / "widths"), ranks_per_node=2)
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


def assert_unbroken(story: Story, expected: Rows, *, to_the_bit: bool) -> None:
    """Losses are those of ``expected``, and every position was consumed once, in order."""
    for record in story.run.records:  # with -s: the numbers of docs/slurm.md
        print(record.incarnation, record.cause, f"lost before: {record.lost_tokens} tokens")
    found = rows(story.run.folder)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    schedule = ledger_schedule(read_ledger(story.run.folder / "ledger.jsonl"))
    consumed_tokens = position = 0
    for row in found:
        plan = schedule.at(consumed_tokens)
        assert plan.position == position
        position, consumed_tokens = position + plan.num_samples, plan.next_consumed_tokens
        assert row["consumed_tokens"] == consumed_tokens
    assert position == schedule.total_samples
    if to_the_bit:
        assert found == expected
    name = "train/loss_nats_per_token"
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4)


def causes(story: Story) -> list[str]:
    return [record.cause for record in story.run.records]


def test_lost_ranks_nodes_links_and_preemption_leave_no_trace(
    stories: dict[str, Future[Story]], undisturbed_amended: Rows
) -> None:
    story = stories["nodes"].result()
    assert_unbroken(story, undisturbed_amended, to_the_bit=True)
    assert len(story.run.records) == 5 and causes(story)[-1] == "complete"
    assert story.run.records[0].cause == "lost-rank"
    assert story.run.records[1].cause.startswith("signal")
    first, second, third, fourth, fifth = [record.job_id for record in story.run.records]
    assert first == second  # a lost rank needs no new job
    assert third == fourth  # nor does a lost node, where there is a spare
    assert len({first, third, fifth}) == 3
    leftovers = [job for job in story.run.cluster("exec", "squeue", "-h").splitlines()]
    assert not any(story.run.records[-1].chain.split("/")[0] in line for line in leftovers)


def test_time_limit_goes_on_in_the_next_job_and_a_zombie_is_fenced(
    stories: dict[str, Future[Story]], undisturbed: Rows
) -> None:
    story = stories["slices"].result()
    assert_unbroken(story, undisturbed, to_the_bit=True)
    warned, stale = story.facts["warned"], story.facts["stale"]
    ends = {record.incarnation: record for record in story.run.records}
    assert ends[warned].cause == "signal:SIGUSR1" and ends[warned + 1].lost_tokens == 0
    assert "fenced" in story.facts["last words"]
    assert ends[stale].nodes != ends[stale + 1].nodes


def test_half_the_nodes_take_over(stories: dict[str, Future[Story]], undisturbed: Rows) -> None:
    story = stories["widths"].result()
    assert_unbroken(story, undisturbed, to_the_bit=False)
    assert [record.num_ranks for record in story.run.records] == [4, 2]


@pytest.mark.parametrize(("launcher", "nodes", "ranks"), [("torchrun", 2, 1), ("srun", 4, 2)])
def test_clean_run_is_the_local_run(
    launcher: str,
    nodes: int,
    ranks: int,
    cluster: Cluster,
    corpus: Path,
    folder: Path,
    undisturbed: Rows,
    stories: dict[str, Future[Story]],
) -> None:
    for future in stories.values():
        future.exception()  # two cores are enough for one of these at a time
    run = SlurmRun(
        cluster,
        write_toy(corpus, folder / launcher),
        nodes=nodes,
        ranks_per_node=ranks,
        launcher=launcher,
    )
    run.submit()
    run.wait_for_end()
    story = Story(run)
    assert causes(story) == ["complete"]
    assert_unbroken(story, undisturbed, to_the_bit=nodes * ranks == 2)
    (start,) = [event for event in run.events if event["what"] == "start"]
    switches = [int(node[-1]) % 2 for node in start["nodes"].split(",")]
    assert switches == sorted(switches)  # odd nodes hang off another switch than even ones
    status = json.loads(cluster.command("status", run.folder, "--json"))
    assert status["state"] == "finished" and status["step"] == STEPS
