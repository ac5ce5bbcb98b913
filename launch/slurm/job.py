"""What the batch script asks before each start of the ranks: ``python -m launch.slurm.job FILE``.

Prints shell assignments and ends with 0 when the ranks shall start. Else the job is over with the
exit code of this program: ``OVER_WELL`` stands for 0, the run is finished or the next job of the
chain goes on; 1 it failed; 2 its input is wrong; 3 it was asked to end, saved, and nobody goes on.

Everything a chain does is done here: the verdict on the start before, the successor, nodes left
out, the way back to an older checkpoint. Needs Python's standard library only: it runs on the batch
node, outside any container.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch.slurm import client
from launch.slurm.exclude import nodes_to_exclude
from launch.slurm.policy import FAILED, UNFINISHED, WELL, WRONG_INPUT, Decision, Rules, decide
from launch.slurm.submission import Submission, events, tell
from megatron_curr.incarnation.conclude import conclude
from megatron_curr.incarnation.record import Record, incarnations
from megatron_curr.training.checkpoint_folder import go_back

OVER_WELL = 100
_PAUSE_S = 5.0
_FIRST_PORT, _NUM_PORTS = 15_000, 15_000  # below the ports that Linux gives to connections


@dataclass(frozen=True)
class Here:
    """This job, as its batch script sees itself."""

    submission: Submission
    job_id: str
    restart: int  # how often Slurm has put the job back into the queue
    attempt: int  # starts of the ranks in this life of the job before this one
    exit_code: int | None  # of the launcher of the start before
    nodes: tuple[str, ...]

    @classmethod
    def from_environment(cls, file: Path) -> Here:
        """From Slurm's variables and the batch script's own two."""
        code = os.environ.get("MEGATRON_CURR_EXIT_CODE", "")
        return cls(
            submission=Submission.read(file),
            job_id=os.environ["SLURM_JOB_ID"],
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            attempt=int(os.environ.get("MEGATRON_CURR_ATTEMPT", 0)),
            exit_code=int(code) if code else None,
            nodes=tuple(client.hostnames(os.environ["SLURM_JOB_NODELIST"])),
        )

    @property
    def run_folder(self) -> Path:
        """The run's."""
        return Path(self.submission.run_folder)

    @property
    def rules(self) -> Rules:
        """When to give up."""
        return Rules(self.submission.max_fruitless, self.submission.exclude_s)

    def say(self, what: str, **facts: object) -> None:
        """Into the events, and to the job's output."""
        tell(self.submission, what, job_id=self.job_id, restart=self.restart, **facts)
        story = ", ".join(f"{name} {value}" for name, value in facts.items())
        print(f"[{time.strftime('%H:%M:%S')}] {what}: {story}", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Say what the batch script has to do now."""
    (file,) = sys.argv[1:] if arguments is None else arguments
    here = Here.from_environment(Path(file))
    if here.attempt and not _is_ours(here):  # before anything else: a successor may be at work
        here.say("stale", why="Slurm has ended this job; another may hold the run by now")
        return FAILED
    records = _concluded(here)
    ours = [record for record in records if record.chain == here.submission.chain]
    decision = _unclaimed(here, len(records)) or decide(ours, here.rules)
    if decision.goes_back:
        decision = _go_back(here, ours[-1], decision)
    if not decision.goes_on:
        here.say("stop", why=decision.why)
        if here.submission.by == "singleton":
            client.cancel_waiting(here.submission.name)
        return OVER_WELL if decision.exit_code == WELL else decision.exit_code
    excluded = _excluded(here, records)
    has_successor = _care_for_successor(here, excluded)
    nodes, refusal = _choose_nodes(here, ours, excluded)
    if refusal:
        here.say("leave", why=refusal)
        if has_successor:
            if here.submission.by == "requeue":
                client.requeue(here.job_id)
            return OVER_WELL
        return UNFINISHED if ours and ours[-1].cause.startswith("signal") else FAILED
    here.say("start", nodes=",".join(nodes), incarnations=len(records), why=decision.why)
    print(_assignments(here, nodes))
    return 0


def _concluded(here: Here) -> list[Record]:
    """All records; the newest incarnation gets its own now if it belongs to this chain."""
    known = incarnations(here.run_folder)
    claim = known[-1].claim if known else None
    if claim is not None and claim.chain == here.submission.chain:
        conclude(here.run_folder)
    return [record for record in (i.record for i in known) if record is not None]


def _is_ours(here: Here) -> bool:
    """Whether Slurm still runs this life of the job; a script can outlive it on a lost node."""
    facts = client.fields_of("job", here.job_id)
    is_same = facts.get("Restarts", "0") == str(here.restart)
    return is_same and facts.get("JobState") == "RUNNING"


def _unclaimed(here: Here, num_records: int) -> Decision | None:
    """Give up where ranks end again and again before one of them can say a word."""
    starts = [e for e in events(here.run_folder, submission=here.submission.number)]
    starts = [e for e in starts if e["what"] == "start" and e["incarnations"] == num_records]
    if not starts:
        return None
    log = here.run_folder / "logs" / f"slurm-{here.job_id}.out"
    if here.exit_code == WRONG_INPUT:
        why = f"the ranks refused their input; see {log}"
        return Decision(False, why, exit_code=WRONG_INPUT)
    if len(starts) >= here.rules.max_fruitless:
        return Decision(
            False, f"the ranks ended {len(starts)} times before the first could begin; see {log}"
        )
    time.sleep(_PAUSE_S)  # it may have been Slurm, which was not done with the step before
    return None


def _go_back(here: Here, last: Record, decision: Decision) -> Decision:
    chosen = go_back(here.run_folder, before_step=last.resumed_step)
    if chosen is None:
        return Decision(
            False, f"{decision.why}; there is no intact checkpoint before step {last.resumed_step}"
        )
    here.say("went back", to=chosen.name, why=decision.why)
    return Decision(True, f"from the older {chosen.name}, as {decision.why}")


def _excluded(here: Here, records: Sequence[Record]) -> list[str]:
    """Nodes to leave out; a job that nobody succeeds, or itself does, has to take what it got."""
    if here.submission.by != "singleton":
        return []
    return nodes_to_exclude(here.submission, records)


def _care_for_successor(here: Here, excluded: list[str]) -> bool:
    """Whether another job goes on after this one, or this one again.

    A singleton chain always has it in the queue, before anything can go wrong.
    """
    submission = here.submission
    if submission.by == "requeue":
        return submission.max_jobs is None or here.restart + 1 < submission.max_jobs
    if submission.by != "singleton":
        return False
    waiting = [job for job in client.jobs_named(submission.name) if job.state == "PENDING"]
    if waiting:
        if excluded:
            client.exclude_nodes(waiting[0].job_id, excluded)
            here.say("exclude", nodes=",".join(excluded), of=waiting[0].job_id)
        return True
    jobs = [e for e in events(here.run_folder, submission=submission.number) if e["what"] == "job"]
    if submission.max_jobs is not None and len(jobs) >= submission.max_jobs:
        return False
    options = ["--dependency=singleton", *([f"--exclude={','.join(excluded)}"] if excluded else [])]
    job_id = client.submit(submission.script, *options, inherit=submission.inherit)
    here.say("job", id=job_id, excluded=",".join(excluded))
    return True


def _choose_nodes(
    here: Here, ours: Sequence[Record], excluded: Sequence[str]
) -> tuple[list[str], str | None]:
    """The nodes of the next start in rank order, or why there is none in this job."""
    submission, nodes = here.submission, list(here.nodes)
    if here.attempt:
        last = ours[-1] if ours else None
        if last is not None and last.cause.startswith("signal"):
            return [], "it was asked to end"
        if here.attempt > submission.restarts_per_job:
            return [], f"{here.attempt} starts were made in this job"
        if _seconds_left(here) < submission.min_slice_s:
            return [], "too little time is left before the limit"
        usable = client.usable_nodes()
        nodes = [node for node in nodes if node in usable]
    good = [node for node in nodes if node not in excluded]
    if len(good) < submission.num_nodes:
        lost = ", ".join(sorted(set(here.nodes) - set(good)))
        return [], f"without {lost} there are {len(good)} of {submission.num_nodes} nodes"
    if submission.rank_order == "topology":
        switches = client.switch_of_nodes()
        good.sort(key=lambda node: switches.get(node, ""))  # stable: else as Slurm has them
    return good[: submission.num_nodes], None


def _seconds_left(here: Here) -> float:
    end = client.fields_of("job", here.job_id).get("EndTime", "")
    try:
        return datetime.fromisoformat(end).timestamp() - time.time()
    except ValueError:  # "Unknown", "NONE": no limit
        return float("inf")


def _assignments(here: Here, nodes: Sequence[str]) -> str:
    """What the template evaluates; the host file holds a line a task, in rank order."""
    submission = here.submission
    by_rank = submission.launcher == "srun"
    tasks_per_node = submission.ranks_per_node if by_rank else 1
    host_file = submission.folder / f"hosts-{here.job_id}-{here.restart}-{here.attempt}"
    host_file.write_text("".join(f"{node}\n" * tasks_per_node for node in nodes))
    offset = int(here.job_id) * 31 + here.restart * 7 + here.attempt
    values = {
        "SLURM_HOSTFILE": host_file,
        "MASTER_ADDR": client.address_of(nodes[0]),
        "MASTER_PORT": _FIRST_PORT + offset % _NUM_PORTS,
        "MEGATRON_CURR_TASKS": tasks_per_node * len(nodes),
        "MEGATRON_CURR_CHAIN": submission.chain,
        "MEGATRON_CURR_SUBMITTED_S": _submitted_s(here),
        "MEGATRON_CURR_LAUNCHED_S": f"{time.time():.3f}",
        "MEGATRON_CURR_ATTEMPT": here.attempt + 1,
        "MEGATRON_CURR_RECIPE": _recipe(here),
    }
    return "\n".join(f"export {name}={shlex.quote(str(v))}" for name, v in values.items())


def _recipe(here: Here) -> Path:
    """The submission's; the run's own once it is the newer one, since amendments are in there."""
    submitted, latest = here.submission.folder / "recipe.yaml", here.run_folder / "recipe.yaml"
    if latest.is_file() and latest.stat().st_mtime_ns > submitted.stat().st_mtime_ns:
        return latest
    return submitted


def _submitted_s(here: Here) -> float:
    """When this job could have begun, had the cluster been empty: its own submission."""
    for event in events(here.run_folder, submission=here.submission.number):
        if event["what"] == "job" and event.get("id") == here.job_id:
            return float(event["at_s"])
    return here.submission.submitted_at_s


if __name__ == "__main__":
    try:
        code = main()
    except client.SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        code = FAILED
    sys.exit(code)
