"""``megatron-curr status``: what is known of a run, from its folder and the Slurm that runs it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.slurm import client
from launch.slurm.submission import Submission, events, submissions
from launch.slurm.submit import job_name
from megatron_curr.curriculum.ledger import ledger_schedule, read_ledger
from megatron_curr.curriculum.lots import planner_of
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.incarnation.accounts import read_accounts
from megatron_curr.incarnation.conclude import judge
from megatron_curr.incarnation.record import Claim, Incarnation, Record, incarnations
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.units import format_count, format_duration

_TAIL_BYTES = 1 << 18
_RECENT_STEPS = 50
_LOSSES = {"train/loss_nats_per_token": "nats/token", "train/flow_mse": "squared error"}
_WATCH_EVERY_S = 5.0
_SILENT_FOR_S = 30.0  # signs of life come every two seconds
_NO_LOSS = "none: nothing counted in the last step, or it was not finite"
RUNNING = "running"
_WANTED = ("stop-at", "signal", "interrupted")  # causes that somebody asked for


@dataclass(frozen=True, kw_only=True)
class Status:
    """A run at a glance. Times are Unix times; None stands for what cannot be known."""

    run_folder: str
    state: str
    jobs: list[dict[str, str]]
    nodes: list[str]
    phase: str | None
    step: int
    consumed_tokens: int
    total_tokens: int | None
    tokens_per_s: float | None
    loss: float | None
    loss_unit: str  # nats per token; mean squared error for video
    eta_s: float | None
    last_row_s: float | None
    checkpoint_step: int | None
    checkpoint_tokens: int | None
    restarts: list[dict[str, Any]]  # every incarnation that ended, with its cause
    lost_tokens: int
    effective_frac: float | None
    last_event: dict[str, Any] | None

    def to_json(self) -> str:
        """For scripts."""
        return json.dumps(asdict(self), indent=1)


def read_status(run_folder: Path) -> Status:
    """Look at a run. Raises ``CheckpointError`` where there is none."""
    if not (run_folder / "slurm").is_dir() and not (run_folder / "recipe.yaml").is_file():
        raise CheckpointError(
            f"{run_folder}: no run here; give the run folder that train or submit wrote, "
            "such as runs/demo_text"
        )
    folder = RunFolder(run_folder)
    known = incarnations(run_folder)
    records = [record for i in known if (record := i.record or judge(run_folder, i))]
    ended = [i.record for i in known if i.record]
    is_of_slurm = (run_folder / "slurm").is_dir() or any(i.claim and i.claim.job_id for i in known)
    jobs, says = _jobs(run_folder) if is_of_slurm else ([], "")
    told = events(run_folder)
    rows = _last_steps(folder.metrics)
    loss, loss_unit = next(
        ((rows[-1][name], unit) for name, unit in _LOSSES.items() if rows and name in rows[-1]),
        (None, ""),
    )
    total_tokens = _total_tokens(folder)
    consumed = int(rows[-1]["consumed_tokens"]) if rows else 0
    speed = median(row["perf/tokens_per_s"] for row in rows) if rows else None
    state = folder.newest_state()
    accounts = read_accounts(run_folder)
    return Status(
        run_folder=str(run_folder),
        state=(
            _state(jobs, says, known[-1].record if known else None, told, submissions(run_folder))
            if is_of_slurm
            else _state_here(folder, known[-1] if known else None)
        ),
        jobs=jobs,
        nodes=list(records[-1].nodes) if records else [],
        phase=rows[-1]["phase"] if rows else None,
        step=int(rows[-1]["step"]) if rows else 0,
        consumed_tokens=consumed,
        total_tokens=total_tokens,
        tokens_per_s=speed,
        loss=loss,
        loss_unit=loss_unit,
        eta_s=(total_tokens - consumed) / speed if speed and total_tokens is not None else None,
        last_row_s=rows[-1]["time_s"] if rows else None,
        checkpoint_step=state.step if state else None,
        checkpoint_tokens=state.consumed_tokens if state else None,
        restarts=[_restart(record) for record in ended],
        lost_tokens=accounts.lost_tokens if accounts else 0,
        effective_frac=accounts.effective_frac if accounts else None,
        last_event=told[-1] if told else None,
    )


def _restart(record: Record) -> dict[str, Any]:
    keys = ("incarnation", "job_id", "verdict", "cause", "detail", "step", "consumed_tokens")
    return {key: getattr(record, key) for key in (*keys, "ended_at_s")}


def _jobs(run_folder: Path) -> tuple[list[dict[str, str]], str]:
    """The run's jobs that wait or run, and what Slurm said where it could not tell."""
    try:
        return [asdict(job) for job in client.jobs_named(job_name(run_folder))], ""
    except client.SlurmError as error:
        return [], str(error)


def _state(
    jobs: list[dict[str, str]],
    slurm_says: str,
    newest: Record | None,
    told: list[dict[str, Any]],
    known: list[Submission],
) -> str:
    """One sentence."""
    active = [job for job in jobs if job["state"] != "PENDING"]
    if active:
        return f"{active[0]['state'].lower()}: job {active[0]['job_id']} on {active[0]['nodes']}"
    if newest is not None and newest.verdict == "finished":
        return "finished"
    if jobs:
        return f"waiting: job {jobs[0]['job_id']} ({jobs[0]['reason']})"
    stops = [event for event in told if event["what"] == "stop"]
    if stops and stops[-1] is told[-1]:
        return f"stopped: {stops[-1]['why']}"
    last = f"; the last start: {newest.verdict}, {newest.detail}" if newest else ""
    if slurm_says:
        return f"unknown, as Slurm does not answer ({slurm_says}){last}"
    if known and newest is None:
        logs = sorted((Path(known[-1].run_folder) / "logs").glob("slurm-*.out"))
        if not logs:
            return "ended without output: do all nodes see the run folder?"
        return f"ended before a rank began: {_last_error(logs[-1])}see {logs[-1]}"
    return f"no job{last}" + ("" if newest is None else "; submit again to go on")


def _last_error(log: Path) -> str:
    """What a job's output says last of an error, such as a setup line that failed."""
    lines = log.read_text(encoding="utf-8", errors="replace")[-_TAIL_BYTES:].splitlines()
    found = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return f"{found[-1]}; " if found else ""


def _state_here(folder: RunFolder, newest: Incarnation | None) -> str:
    """One sentence on a run that ``train`` has started, without Slurm."""
    claim = newest.claim if newest is not None else None
    if newest is None or claim is None:
        return "not started"
    record = newest.record
    if record is None and _lives(folder, newest, claim):
        return f"{RUNNING}: pid {claim.pid} on {claim.host}, {claim.num_ranks} ranks"
    record = record or judge(folder.path, newest)
    assert record is not None, "there is a claim"
    if record.verdict == "finished":
        return "finished"
    how = "stopped" if record.cause.partition(":")[0] in _WANTED else "failed"
    return f"{how}: {record.detail}; to go on: {folder.resume_command(claim.num_ranks)}"


def _lives(folder: RunFolder, newest: Incarnation, claim: Claim) -> bool:
    """Whether its lock is held, or, where locks of other hosts may not be seen, it shows life."""
    if claim.host != socket.gethostname():
        return time.time() - (newest.folder / "alive").stat().st_mtime < _SILENT_FOR_S
    try:
        folder.check_free()
    except CheckpointError:
        return True
    return False


def _last_steps(metrics: Path) -> list[dict[str, Any]]:
    """The newest rows of steps, oldest first; only the end of the file is read."""
    try:
        with metrics.open("rb") as stream:
            stream.seek(max(metrics.stat().st_size - _TAIL_BYTES, 0))
            lines = stream.read().splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # the first may be cut, the last may grow
            continue
        if not _LOSSES.keys().isdisjoint(row) and "perf/tokens_per_s" in row:
            rows.append(row)
    return rows[-_RECENT_STEPS:]


def _total_tokens(folder: RunFolder) -> int | None:
    try:
        planner = planner_of(load_recipe(folder.recipe))
        return ledger_schedule(read_ledger(folder.ledger), planner).total_tokens
    except (OSError, CheckpointError, RecipeError):
        return None


def lines_of(status: Status) -> Iterator[tuple[str, str]]:
    """Label and text, for a person."""
    yield "state", status.state
    if status.nodes:
        yield "nodes", ", ".join(status.nodes[:8]) + (" ..." if len(status.nodes) > 8 else "")
    total = status.total_tokens
    share = f" of {format_count(total)} ({status.consumed_tokens / total:.1%})" if total else ""
    phase = f", phase {status.phase}" if status.phase else ""
    yield (
        "progress",
        f"{format_count(status.consumed_tokens)}{share} tokens, step {status.step}{phase}",
    )
    if status.tokens_per_s:
        yield "speed", f"{format_count(round(status.tokens_per_s))} tokens/s"
        is_known = status.loss is not None
        yield "loss", f"{status.loss:.4f} {status.loss_unit}" if is_known else _NO_LOSS
    if status.eta_s:
        yield "to go", f"{format_duration(status.eta_s)} at this speed"
    if status.last_row_s:
        yield "last step", f"{format_duration(max(time.time() - status.last_row_s, 0))} ago"
    if status.checkpoint_step is not None:
        tokens = format_count(status.checkpoint_tokens or 0)
        yield "checkpoint", f"step {status.checkpoint_step}, token {tokens}"
    if status.effective_frac is not None:
        lost = (
            f", {format_count(status.lost_tokens)} tokens trained again"
            if status.lost_tokens
            else ""
        )
        yield "effective", f"{status.effective_frac:.0%} of the wall clock{lost}"
    for end in status.restarts:
        yield (
            f"start {end['incarnation']}",
            f"{end['verdict']} at step {end['step']}: {end['detail']}",
        )
    if status.last_event and status.last_event["what"] in ("stop", "exclude", "went back", "leave"):
        facts = {k: v for k, v in status.last_event.items() if k in ("why", "nodes", "to")}
        yield "chain", f"{status.last_event['what']}: {', '.join(map(str, facts.values()))}"


def show_status(run_folder: Path, *, watch: bool, as_json: bool) -> None:
    """Print the status, again and again with ``watch`` until nothing waits or runs any more."""
    console = Console(soft_wrap=True, highlight=False)
    while True:
        status = read_status(run_folder)
        if as_json:
            print(status.to_json(), flush=True)
        else:
            if watch and console.is_terminal:
                console.clear()
            console.print(_table(status))
        if not watch or not (status.jobs or status.state.startswith(RUNNING)):
            return
        time.sleep(_WATCH_EVERY_S)


def _table(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    for label, text in lines_of(status):
        table.add_row(Text(label, style="bold"), Text(text))
    return table
