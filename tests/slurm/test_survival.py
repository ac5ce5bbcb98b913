"""Runs on a real Slurm, broken in every way it knows; each must be the run that nothing broke.

Four runs go on side by side, since most of the time is spent waiting for Slurm to notice. What a
run went through is written down by its driver and judged by the tests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_curr.curriculum.ledger import ledger_schedule, read_ledger
from megatron_curr.training.checkpoint_folder import find_fault
from tests.slurm.cluster import Cluster, SlurmRun, wait_until
from tests.slurm.drivers import (
    Story,
    by_own_disks,
    go_back_into_the_queue,
    lose_disks_then_diverge,
    lose_nodes,
    run_on_all_nodes_then_on_half,
    run_out_of_time_and_leave_a_zombie,
)
from tests.slurm.toy import STEPS, write_toy
from tests.training.runs import rows, verified_steps

Rows = list[dict[str, Any]]
_AT_ONCE = 4


@pytest.fixture(scope="module")
def stories(
    cluster: Cluster, corpus: Path, folder: Path, undisturbed: Rows, undisturbed_amended: Rows
) -> Iterator[dict[str, Future[Story]]]:
    """The drivers, at work; the references come first, as they are quick."""
    drivers: dict[str, Callable[[Cluster, Path, Path], Story]] = {
        "nodes": lose_nodes,
        "slices": run_out_of_time_and_leave_a_zombie,
        "widths": run_on_all_nodes_then_on_half,
        "requeued": go_back_into_the_queue,
        "hopeless": lose_disks_then_diverge,
    }
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield {name: pool.submit(drive, cluster, corpus, folder) for name, drive in drivers.items()}


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
    assert verified_steps(story.run.folder) == STEPS
    if to_the_bit:
        assert found == expected
    name = "train/loss_nats_per_token"
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-4)


def all_rows(run_folder: Path) -> Rows:
    """With what a clock says."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


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


def test_a_requeued_job_goes_on_under_its_number(
    stories: dict[str, Future[Story]], undisturbed: Rows
) -> None:
    story = stories["requeued"].result()
    assert_unbroken(story, undisturbed, to_the_bit=True)
    first, second = story.run.records
    assert first.cause.startswith("signal") and second.cause == "complete"
    assert first.job_id == second.job_id
    assert (first.restart, second.restart, second.lost_tokens) == (0, 1, 0)
    assert [event["what"] for event in story.run.events].count("job") == 1


def test_nodes_that_fail_are_left_out_for_a_while_and_a_chain_without_progress_stops(
    stories: dict[str, Future[Story]],
) -> None:
    story = stories["hopeless"].result()
    first, second = story.run.records[:2]
    assert first.cause == second.cause == "preflight:node-local"
    assert {*first.bad_nodes, *second.bad_nodes} == {"node7", "node8"}
    status = story.facts["disks"]["state"]
    assert status.startswith("stopped: 2 starts in a row made no checkpoint, the last: ")
    assert f"{second.nodes[0]}: its own disk takes no checkpoint: [Errno 20]" in status
    jobs = [event for event in story.run.events if event["what"] == "job"]
    (ban,) = [event for event in story.run.events if event["what"] == "exclude"]
    assert first.nodes[0] in ban["nodes"].split(",") and ban["of"] == second.job_id
    assert jobs[-1]["excluded"] == ""  # the failures are forgotten


def test_a_step_that_dies_every_time_is_tried_from_an_older_checkpoint_and_then_left(
    stories: dict[str, Future[Story]],
) -> None:
    story = stories["hopeless"].result()
    ends = story.run.records[2:]
    assert [(end.step, end.cause) for end in ends] == [(20, "nonfinite")] * 3
    assert [(end.resumed_step, end.saved_step) for end in ends] == [(0, 16), (16, 16), (8, 16)]
    assert len({end.job_id for end in ends}) == 1
    assert story.run.cluster.state_of(str(ends[-1].job_id)) == "FAILED"  # so afterok does not begin
    (back,) = [event for event in story.run.events if event["what"] == "went back"]
    assert back["to"] == "step_00000008"
    status = story.facts["diverged"]["state"]
    assert status.startswith("stopped: step 20 ended 3 times with nonfinite, from an older check")
    checkpoints = story.run.folder / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {
        "latest", "left-step_00000016", "step_00000008", "step_00000016",
    }  # fmt: skip
    assert find_fault(checkpoints / "step_00000016") is None
    # It came by way of the node's own disk, where nothing is left.
    resumed = next(row for row in all_rows(story.run.folder) if row.get("step") == 9)
    copies = story.facts["copies"]
    assert copies.stat().st_mtime > resumed["time_s"] and not list(copies.iterdir())


def test_half_the_nodes_take_over(stories: dict[str, Future[Story]], undisturbed: Rows) -> None:
    story = stories["widths"].result()
    assert_unbroken(story, undisturbed, to_the_bit=False)
    assert [record.num_ranks for record in story.run.records] == [4, 2]


@pytest.mark.parametrize(("launcher", "num_nodes", "ranks"), [("torchrun", 2, 1), ("srun", 4, 2)])
def test_clean_run_is_the_local_run(
    launcher: str,
    num_nodes: int,
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
        nodes=num_nodes,
        ranks_per_node=ranks,
        launcher=launcher,
        **by_own_disks(cluster),
    )
    run.submit()
    run.wait_for_end()
    story = Story(run)
    assert causes(story) == ["complete"]
    assert_unbroken(story, undisturbed, to_the_bit=num_nodes * ranks == 2)
    (start,) = [event for event in run.events if event["what"] == "start"]
    nodes = start["nodes"].split(",")
    switches = [int(node[-1]) % 2 for node in nodes]
    assert switches == sorted(switches)  # odd nodes hang off another switch than even ones
    name = story.run.records[0].chain.partition("/")[0]
    copies = {node: cluster.folder / "local" / node / "copies" / name for node in nodes}
    assert not any(file for folder in copies.values() for file in folder.iterdir())
    status = json.loads(cluster.command("status", run.folder, "--json"))
    assert status["state"] == "finished" and status["step"] == STEPS
    wait_until(lambda: cluster.state_of(start["job_id"]) == "COMPLETED", "the job's end")
    again = cluster.command("submit", run.recipe, "--profile", run.profile, "--until-done")
    assert "the run is finished, at token 98,304; nothing was submitted" in again
    assert [event["what"] for event in run.events].count("job") == 1
