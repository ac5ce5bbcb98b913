"""What a chain does next: a pure function of the records that incarnations left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_curr.incarnation.record import Record

# Exit codes of a job, for its state and for what depends on it.
WELL, FAILED, WRONG_INPUT, UNFINISHED = 0, 1, 2, 3
# Ends that say nothing about the step at which they happened.
_NOT_OF_A_STEP = ("signal", "preflight", "no-meeting", "fenced")
_STOPS = {"wrong-input": WRONG_INPUT, "stop-at": UNFINISHED, "interrupted": UNFINISHED}


@dataclass(frozen=True)
class Rules:
    """When a chain gives up. ``exclude_s``: how long a node that failed is left out."""

    max_fruitless: int
    exclude_s: float


@dataclass(frozen=True)
class Decision:
    """``why`` is for a person; ``goes_back`` asks for an older checkpoint first.

    ``exit_code`` is the job's where the chain ends.
    """

    goes_on: bool
    why: str
    goes_back: bool = False
    exit_code: int = FAILED


def decide(records: Sequence[Record], rules: Rules) -> Decision:
    """From the records of one chain, oldest first."""
    if not records:
        return Decision(True, "first start")
    last = records[-1]
    if last.verdict == "finished":
        return Decision(False, f"finished at token {last.consumed_tokens:,}", exit_code=WELL)
    if last.verdict == "stop":
        why = f"incarnation {last.incarnation} said stop: {last.detail}"
        return Decision(False, why, exit_code=_STOPS.get(last.cause, FAILED))
    same = _repeats(records)
    if len(same) > 1:
        story = f"step {last.step} ended {len(same)} times with {last.cause}"
        newest = max(record.resumed_step for record in same)
        if any(record.resumed_step < newest for record in records[records.index(same[1]) :]):
            return Decision(False, f"{story}, from an older checkpoint, too: {last.detail}")
        return Decision(True, f"{story}: {last.detail}", goes_back=True)
    fruitless = _fruitless(records)
    if fruitless >= rules.max_fruitless:
        return Decision(
            False, f"{fruitless} starts in a row made no checkpoint, the last: {last.detail}"
        )
    return Decision(True, f"after {last.cause} at step {last.step}: {last.detail}")


def _repeats(records: Sequence[Record]) -> list[Record]:
    """The records that died as the last did, at one step of one cause, since that was passed.

    A start that took no step, such as one killed while it loads, says nothing about the checkpoint
    it began from.
    """

    def key(record: Record) -> tuple[int, str] | None:
        is_of_a_step = record.cause.partition(":")[0] not in _NOT_OF_A_STEP
        took_steps = record.step > record.resumed_step
        return (record.step, record.cause) if is_of_a_step and took_steps else None

    last = key(records[-1])
    same: list[Record] = []
    for record in reversed(records):
        if last is None or record.saved_step > last[0]:
            break
        if key(record) == last:
            same.append(record)
    return same[::-1]


def _fruitless(records: Sequence[Record]) -> int:
    """The starts at the end that made no checkpoint, whatever ended them."""
    count = 0
    for record in reversed(records):
        if record.saved_tokens > record.resumed_tokens:
            break
        count += 1
    return count


def excluded_nodes(records: Sequence[Record], rules: Rules, *, now_s: float) -> dict[str, float]:
    """Nodes that failed lately, the longest ago first, and the Unix time until they are left out.

    Records of all chains count: a bad node is bad for every one.
    """
    until = {}
    for record in records:
        for node in record.bad_nodes:
            until[node] = record.ended_at_s + rules.exclude_s
    return dict(sorted(((n, t) for n, t in until.items() if t > now_s), key=lambda item: item[1]))
