"""What a chain does next, from records alone."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.slurm.policy import Rules, decide, excluded_nodes
from megatron_curr.incarnation.record import Record

RULES = Rules(max_fruitless=3, exclude_s=3600)


def record(**values: Any) -> Record:
    """One that was asked to end after 10 steps and saved there."""
    base: dict[str, Any] = {
        "incarnation": 1,
        "verdict": "continue",
        "cause": "signal:SIGUSR1",
        "detail": "stopped",
        "step": 10,
        "consumed_tokens": 1000,
        "resumed_step": 0,
        "resumed_tokens": 0,
        "saved_step": 10,
        "saved_tokens": 1000,
        "lost_tokens": 0,
        "lost_s": 0.0,
        "bad_nodes": (),
        "suspect_ranks": (),
        "times_s": {},
        "step_time_s": 1.0,
        "save_s": 1.0,
        "began_at_s": 0.0,
        "ended_at_s": 100.0,
        "chain": "run/0001",
        "job_id": "1",
        "restart": 0,
        "num_ranks": 2,
        "nodes": ("node0",),
    }
    return Record(**{**base, **values})


def death(**values: Any) -> Record:
    return record(**{"cause": "error:ValueError", "saved_step": 5, "saved_tokens": 500, **values})


def test_begins_and_goes_on_after_being_asked_to_end() -> None:
    assert decide([], RULES).goes_on
    ends = [record(resumed_tokens=1000 * n, saved_tokens=1000 * (n + 1)) for n in range(20)]
    assert decide(ends, RULES).goes_on


def test_a_finished_run_and_one_that_says_stop_do_not_go_on() -> None:
    decision = decide([record(verdict="finished", cause="complete")], RULES)
    assert not decision.goes_on and decision.why == "finished at token 1,000"
    decision = decide([record(verdict="stop", cause="wrong-input", detail="no shards")], RULES)
    assert not decision.goes_on and "no shards" in decision.why


@pytest.mark.parametrize(
    ("verdict", "cause", "code"),
    [
        ("finished", "complete", 0),
        ("stop", "wrong-input", 2),
        ("stop", "stop-at", 3),
        ("stop", "interrupted", 3),
        ("stop", "preflight:versions", 1),
    ],
)
def test_a_job_ends_with_the_code_of_what_happened(verdict: str, cause: str, code: int) -> None:
    assert decide([record(verdict=verdict, cause=cause)], RULES).exit_code == code
    assert decide([record(saved_tokens=0)] * 3, RULES).exit_code == 1


def test_starts_without_a_new_checkpoint_are_counted_in_a_row() -> None:
    idle = record(saved_tokens=0)
    assert decide([idle, idle], RULES).goes_on
    assert decide([idle, idle, record(), idle, idle], RULES).goes_on
    decision = decide([record(), idle, idle, idle], RULES)
    assert not decision.goes_on and decision.why.startswith("3 starts in a row made no checkpoint")


def test_a_step_that_dies_twice_of_one_cause_is_tried_from_an_older_checkpoint_once() -> None:
    assert decide([death()], RULES).goes_on and not decide([death()], RULES).goes_back
    again = death(resumed_step=5, resumed_tokens=500)
    decision = decide([death(resumed_step=5), again], RULES)
    assert decision.goes_on and decision.goes_back
    older = death(resumed_step=3, resumed_tokens=300)
    for first in (death(resumed_step=5), death(resumed_step=0)):
        decision = decide([first, again, older], RULES)
        assert not decision.goes_on and "from an older checkpoint, too" in decision.why


def test_other_causes_other_steps_and_requests_to_end_are_no_repetition() -> None:
    for second in (death(cause="hang"), death(step=11), record()):
        decision = decide([death(), second], RULES)
        assert decision.goes_on and not decision.goes_back
    asked = record(saved_tokens=1000)
    assert not decide([asked, asked], RULES).goes_back


@pytest.mark.parametrize("cause", ["vanished", "lost-rank", "hang", "error:OutOfMemoryError"])
def test_starts_that_take_no_step_are_counted_and_put_no_checkpoint_aside(cause: str) -> None:
    """Killed while it loads: it stands where the start before saved."""
    killed = death(cause=cause, step=10, resumed_step=10, resumed_tokens=1000, saved_tokens=1000)
    chain = [record()]
    for _ in range(2):
        chain.append(killed)
        decision = decide(chain, RULES)
        assert decision.goes_on and not decision.goes_back
    decision = decide([*chain, killed], RULES)
    assert not decision.goes_on and "3 starts in a row made no checkpoint" in decision.why


def test_a_preemption_between_two_deaths_at_a_step_hides_neither() -> None:
    preempted = record(step=8, resumed_step=5, saved_step=8, saved_tokens=800)
    decision = decide([death(), preempted, death(resumed_step=8)], RULES)
    assert decision.goes_back
    passed = record(step=12, saved_step=12, resumed_step=5)
    assert not decide([death(), passed, death(resumed_step=5)], RULES).goes_back


@given(st.data())
def test_every_chain_that_gets_no_further_ends(data: st.DataObject) -> None:
    """Whatever ends its starts, as long as no checkpoint lies behind the one at step 6."""
    checkpoints, records = [0, 3, 6], [record(step=6, saved_step=6, saved_tokens=600)]
    for _ in range(60):
        decision = decide(records, RULES)
        if not decision.goes_on:
            return
        if decision.goes_back:
            checkpoints = [step for step in checkpoints if step < records[-1].resumed_step]
            if not checkpoints:
                return
        begin = checkpoints[-1]
        cause = data.draw(st.sampled_from(("vanished", "error:X", "signal:SIGTERM")))
        step = begin + data.draw(st.integers(0, 2))
        if cause.startswith("signal") and begin < step <= 6:
            checkpoints.append(step)
        saved = checkpoints[-1]
        records.append(
            record(
                cause=cause,
                step=step,
                consumed_tokens=100 * step,
                resumed_step=begin,
                resumed_tokens=100 * begin,
                saved_step=saved,
                saved_tokens=100 * saved,
            )
        )
    raise AssertionError("60 starts, and on")


def test_failed_nodes_are_left_out_until_that_expires() -> None:
    records = [
        record(bad_nodes=("node1",), ended_at_s=100.0),
        record(bad_nodes=("node2",), ended_at_s=2000.0, chain="another/0001"),
    ]
    assert list(excluded_nodes(records, RULES, now_s=2100)) == ["node1", "node2"]
    assert list(excluded_nodes(records, RULES, now_s=3800)) == ["node2"]
    assert not excluded_nodes(records, RULES, now_s=6000)
