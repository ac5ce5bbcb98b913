"""What two schedules do differently, by token: complete, and no more than there is."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings

from megatron_curr.curriculum.differences import Change, schedule_differences
from megatron_curr.curriculum.schedule import build_schedule
from megatron_curr.recipe.phases import Curriculum
from tests.curriculum.curricula import curricula


def two_phases(**second: object) -> Curriculum:
    first = {
        "name": "a",
        "tokens": 6400,
        "seq_length": 8,
        "mixture": {"prose": 1.0},
        "global_batch_tokens": 64,
        "learning_rate": 1.0,
    }
    return Curriculum.model_validate(
        {"phases": [first, {"name": "b", "tokens": 6400, "seq_length": 8, **second}]}
    )


def test_each_value_has_its_own_pieces_and_the_end_is_told() -> None:
    old = build_schedule(two_phases(mixture={"prose": 0.5, "code": 0.5}))
    new = build_schedule(
        two_phases(
            mixture={"to": {"prose": 0.25, "code": 0.75}, "over": 3200},
            learning_rate={"to": 0.0},
            tokens=3840,
        )
    )
    changes = {(c.what, c.from_tokens): c for c in schedule_differences(old, new)}
    rate = changes["learning_rate", 6400]
    assert (rate.to_tokens, rate.before, rate.after[0]) == (10240, (1.0, 1.0), 1.0)
    assert changes["mixture.code", 6400].before == (0.5, 0.5)
    assert changes["mixture.code", 6400].after[0] is None  # the ramp begins at prose alone
    assert changes["phase", 10240] == Change(10240, 12800, "phase", ("b", "b"), (None, None))
    assert not any(c.what in ("seq_length", "weight_decay") for c in changes.values()
                   if c.to_tokens <= 10240)  # fmt: skip
    late = schedule_differences(old, new, from_tokens=10240)
    assert {c.from_tokens for c in late} == {10240}


@given(curricula(), curricula())
@settings(max_examples=12)
def test_nothing_differs_from_itself_and_two_differ_both_ways(
    first: Curriculum, second: Curriculum
) -> None:
    one, other = build_schedule(first), build_schedule(second)
    assert schedule_differences(one, one) == []
    forth, back = schedule_differences(one, other), schedule_differences(other, one)
    turned = {replace(change, before=change.after, after=change.before) for change in back}
    assert set(forth) == turned
