"""The verdict on an incarnation, from what its ranks left behind."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_curr.durable import write_once
from megatron_curr.incarnation.record import (
    CAUSES,
    Beat,
    Claim,
    Ending,
    Incarnation,
    Record,
    Verdict,
    incarnations,
)

_TAIL_BYTES = 1 << 18


def conclude(run_folder: Path, incarnation: Incarnation | None = None) -> Record | None:
    """The record of an incarnation that is over (the newest), written if nobody has yet.

    For the batch script, when its launcher has returned. None for a run that never began.
    """
    if incarnation is None:
        known = incarnations(run_folder)
        if not known:
            return None
        incarnation = known[-1]
    return conclude_one(run_folder, incarnation)


def conclude_one(run_folder: Path, incarnation: Incarnation) -> Record | None:
    """Like ``conclude``; the first record stands, whoever wrote it."""
    if incarnation.record is None:
        record = judge(run_folder, incarnation)
        if record is not None:
            write_once(incarnation.folder / "record.json", record.to_json())
    return incarnation.record


def judge(run_folder: Path, incarnation: Incarnation) -> Record | None:
    """The record as it would be written now; None before the claim is there."""
    claim = incarnation.claim
    if claim is None:
        return None
    beat, endings = incarnation.beat, incarnation.endings
    blame = find_blame(endings, incarnation.ranks_by_node, began=beat is not None)
    beat = beat or _no_beat(run_folder, incarnation.number, claim)
    row = _last_row(run_folder / "metrics.jsonl", since_s=claim.claimed_at_s)
    step, consumed_tokens = max(
        (beat.step, beat.consumed_tokens),
        (int(row.get("step", 0)), int(row.get("consumed_tokens", 0))),
    )
    ended_at_s = max([beat.at_s, *(ending.at_s for ending in endings)])
    return Record(
        incarnation=incarnation.number,
        verdict=blame.verdict,
        cause=blame.cause,
        detail=blame.detail,
        step=step,
        consumed_tokens=consumed_tokens,
        resumed_step=beat.resumed_step,
        resumed_tokens=beat.resumed_tokens,
        saved_step=beat.saved_step,
        saved_tokens=beat.saved_tokens,
        lost_tokens=beat.lost_tokens,
        lost_s=beat.lost_s,
        bad_nodes=blame.bad_nodes,
        suspect_ranks=blame.suspect_ranks,
        times_s=_times(run_folder, incarnation.number, claim, beat, ended_at_s),
        step_time_s=beat.step_time_s,
        save_s=beat.save_s,
        began_at_s=claim.launched_at_s,
        ended_at_s=ended_at_s,
        chain=claim.chain,
        job_id=claim.job_id,
        restart=claim.restart,
        num_ranks=claim.num_ranks,
        nodes=tuple(incarnation.ranks_by_node) or (claim.host,),
    )


@dataclass(frozen=True)
class Blame:
    """Why an incarnation ended, and who is at fault."""

    verdict: Verdict
    cause: str
    detail: str
    bad_nodes: tuple[str, ...] = ()
    suspect_ranks: tuple[int, ...] = ()


def find_blame(endings: list[Ending], ranks_by_node: dict[str, list[int]], *, began: bool) -> Blame:
    """Judge by the first ending that is not the echo of another.

    Where all are echoes, the ranks that left no word are at fault; a node all of whose ranks are
    silent is bad, as long as such nodes are the fewer.
    """
    if not endings:
        when = "while training" if began else "before the first step"
        return Blame("continue", "vanished", f"all ranks ended {when} without a word")
    own = [ending for ending in endings if not ending.is_echo]
    first = (own or endings)[0]
    kind = first.cause.partition(":")[0]
    verdict = CAUSES[kind][0] if kind in CAUSES else "continue"
    bad_nodes = tuple(sorted({node for ending in own for node in ending.bad_nodes}))
    detail, suspects = first.detail, tuple(sorted({ending.rank for ending in own}))
    if kind == "hang" or (kind == "lost-rank" and not own):
        spoke = {ending.rank for ending in endings}
        silent = sorted({r for ranks in ranks_by_node.values() for r in ranks} - spoke)
        dumb = [node for node, ranks in ranks_by_node.items() if not set(ranks) & spoke]
        suspects = tuple(silent) or suspects
        if 2 * len(dumb) < len(ranks_by_node):
            bad_nodes = (*bad_nodes, *dumb)
        if silent:
            who = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {_listed(silent)}"
            where = ", ".join(n for n, ranks in ranks_by_node.items() if set(ranks) & set(silent))
            detail = f"{detail}; {who} on {where} left no word"
    if bad_nodes and verdict == "continue":
        verdict = "continue_elsewhere"
    if verdict == "continue_elsewhere" and not bad_nodes:
        verdict = "stop" if kind == "preflight" else "continue"  # nowhere is better
    return Blame(verdict, first.cause, detail, bad_nodes, suspects)


def _listed(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def _times(
    run_folder: Path, number: int, claim: Claim, beat: Beat, ended_at_s: float
) -> dict[str, float]:
    before = [i.record for i in incarnations(run_folder) if i.number < number]
    records = [record for record in before if record is not None]
    asked_s = claim.submitted_at_s
    if asked_s is None:  # nothing waited in a queue, unless Slurm has put the job back into it
        is_requeued = bool(records) and records[-1].chain == claim.chain
        asked_s = records[-1].ended_at_s if is_requeued else claim.launched_at_s
    last_end_s = max((record.ended_at_s for record in records), default=asked_s)
    times_s = {
        "idle": max(asked_s - last_end_s, 0.0),
        "queue": max(claim.launched_at_s - max(asked_s, last_end_s), 0.0),
        "launch": max(claim.started_at_s - claim.launched_at_s, 0.0),
        **beat.times_s,
    }
    told_s = sum(value for name, value in times_s.items() if name not in ("idle", "queue", "other"))
    times_s["other"] = max(ended_at_s - claim.launched_at_s - told_s, 0.0)
    return {name: round(value, 3) for name, value in times_s.items()}


def _no_beat(run_folder: Path, number: int, claim: Claim) -> Beat:
    """For an incarnation that ended before its first beat: it stands where the last one saved."""
    before = [i.record for i in incarnations(run_folder) if i.number < number]
    records = [record for record in before if record is not None]
    step, tokens = (records[-1].saved_step, records[-1].saved_tokens) if records else (0, 0)
    return Beat(
        at_s=claim.claimed_at_s,
        step=step,
        consumed_tokens=tokens,
        resumed_step=step,
        resumed_tokens=tokens,
        saved_step=step,
        saved_tokens=tokens,
    )


def _last_row(path: Path, *, since_s: float) -> dict[str, Any]:
    """The last whole row that was written since; rows are more frequent than beats."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        stream.seek(max(os.fstat(stream.fileno()).st_size - _TAIL_BYTES, 0))
        for line in reversed(stream.read().splitlines()):
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    return row if float(row.get("time_s", 0)) >= since_s else {}
    return {}
