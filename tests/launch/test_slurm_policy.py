"""What a chain does next, from records alone."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from launch.slurm.policy import Rules, decide, excluded_nodes
from megatron_curr.incarnation.record import CAUSES, Record

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


@given(
    st.lists(
        st.builds(
            record,
            cause=st.sampled_from(sorted(set(CAUSES) - {"complete"})),
            step=st.integers(1, 3),
            saved_tokens=st.just(0),
        ),
        min_size=3,
        max_size=6,
    )
)
def test_no_chain_lives_on_without_progress(records: list[Record]) -> None:
    """It stops, or it does what it has not done yet: go back."""
    decision = decide(records, RULES)
    assert not decision.goes_on or decision.goes_back


def test_failed_nodes_are_left_out_until_that_expires() -> None:
    records = [
        record(bad_nodes=("node1",), ended_at_s=100.0),
        record(bad_nodes=("node2",), ended_at_s=2000.0, chain="another/0001"),
    ]
    assert list(excluded_nodes(records, RULES, now_s=2100)) == ["node1", "node2"]
    assert list(excluded_nodes(records, RULES, now_s=3800)) == ["node2"]
    assert not excluded_nodes(records, RULES, now_s=6000)
