"""The schedule: every value a function of consumed tokens, whole steps, exact boundaries."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_curr.curriculum.curves import Curve, Ramp, mean_progress, progress
from megatron_curr.curriculum.schedule import Edition, Schedule, StepPlan, build_schedule
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import Curriculum
from tests.curriculum.curricula import LENGTHS, curricula


def steps_of(schedule: Schedule) -> list[StepPlan]:
    plans, clock = [], 0
    while clock < schedule.total_tokens:
        plans.append(schedule.at(clock))
        clock = plans[-1].next_consumed_tokens
    assert clock == schedule.total_tokens
    return plans


def phase(name: str, tokens: int, seq_length: int, **curves: object) -> dict[str, object]:
    return {"name": name, "tokens": tokens, "seq_length": seq_length, **curves}


def compile_phases(*phases: dict[str, object]) -> Schedule:
    return build_schedule(Curriculum.model_validate({"phases": list(phases)}))


START = {"mixture": {"a": 1.0}, "global_batch_tokens": 64, "learning_rate": 1.0}


@given(curricula())
@settings(max_examples=200)
def test_steps_tile_the_run_without_gap_or_overlap(curriculum) -> None:
    schedule = build_schedule(curriculum)
    plans = steps_of(schedule)
    assert [plan.step for plan in plans] == list(range(schedule.num_steps))
    positions = [plan.position for plan in plans]
    ends = [plan.position + plan.num_samples for plan in plans]
    assert positions == [0, *ends[:-1]] and ends[-1] == schedule.total_samples
    for plan in plans:
        assert schedule.position_of(plan.consumed_tokens) == plan.position
        assert schedule.consumed_at(plan.position) == plan.consumed_tokens
        assert schedule.step_start(plan.next_consumed_tokens - 1) == plan.consumed_tokens


@given(curricula())
@settings(max_examples=200)
def test_no_step_mixes_sequence_lengths(curriculum) -> None:
    schedule = build_schedule(curriculum)
    for plan in steps_of(schedule):
        last = schedule.consumed_at(plan.position + plan.num_samples - 1)
        assert schedule.stretch_at(last).seq_length == plan.seq_length


@given(st.lists(st.integers(8, 3000), min_size=2, max_size=5), st.integers(1, 9))
@settings(max_examples=200)
def test_boundary_is_honoured_to_one_sample_where_the_length_stays(sizes, batch) -> None:
    curves = {**START, "global_batch_tokens": 8 * batch}
    table = [phase(f"p{i}", size, 8, **(curves if i == 0 else {})) for i, size in enumerate(sizes)]
    schedule = compile_phases(*table)
    for number in range(1, len(sizes)):
        start = schedule.stretches[number].start_tokens
        assert abs(start - sum(sizes[:number])) <= 8


@given(curricula())
@settings(max_examples=200)
def test_run_is_within_half_a_step_and_a_sample_of_the_tokens_asked_for(curriculum) -> None:
    schedule = build_schedule(curriculum)
    asked = sum(p.tokens for p in curriculum.phases)
    largest_step = max(plan.step_tokens for plan in steps_of(schedule))
    assume(all(p.tokens >= largest_step for p in curriculum.phases))
    assert abs(schedule.total_tokens - asked) <= largest_step / 2 + max(LENGTHS)


def test_phase_where_the_length_changes_ends_on_a_whole_step() -> None:
    schedule = compile_phases(phase("a", 1000, 8, **START), phase("b", 1000, 16))
    assert [s.start_tokens for s in schedule.stretches] == [0, 1024]
    assert schedule.total_tokens % 64 == 0


def test_step_may_hold_samples_of_two_phases_of_one_length() -> None:
    schedule = compile_phases(phase("a", 1000, 8, **START), phase("b", 1000, 8))
    assert schedule.stretches[1].start_tokens == 1000
    assert 1000 not in {plan.consumed_tokens for plan in steps_of(schedule)}


def test_curve_left_out_holds_where_the_phase_before_ended() -> None:
    ramp = {"from": 0.0, "to": 2.0, "over": 320}
    schedule = compile_phases(
        phase("a", 640, 8, **{**START, "learning_rate": ramp}), phase("b", 640, 8)
    )
    assert schedule.at(0).learning_rate == 0.0
    assert schedule.at(192).learning_rate == pytest.approx(1.2)
    assert schedule.at(320).learning_rate == schedule.at(1216).learning_rate == 2.0
    assert schedule.at(0).weight_decay == 0.1


def test_pieces_follow_each_other_inside_a_phase() -> None:
    rate = [{"from": 0.0, "to": 1.0, "over": 128}, {"to": 0.1, "shape": "cosine"}]
    schedule = compile_phases(phase("a", 1280, 8, **{**START, "learning_rate": rate}))
    rates = [plan.learning_rate for plan in steps_of(schedule)]
    assert rates[:3] == [0.0, 0.5, 1.0]
    assert rates[2:] == sorted(rates[2:], reverse=True) and rates[-1] > 0.1


def test_batch_grows_in_whole_increments() -> None:
    batch = {"from": 64, "to": 256, "increment": 64}
    schedule = compile_phases(phase("a", 6400, 8, **{**START, "global_batch_tokens": batch}))
    sizes = [plan.step_tokens for plan in steps_of(schedule)]
    assert set(sizes) == {64, 128, 192} and sizes == sorted(sizes)
    assert schedule.step_runs[0].num_steps == 34  # 2133 tokens, a third of the ramp, in steps of 64


def test_long_schedule_compiles_and_answers_at_once() -> None:
    batch = {"from": 4_194_304, "to": 16_777_216, "increment": 262_144}
    schedule = compile_phases(
        phase("a", 10**13, 4096, **{**START, "global_batch_tokens": batch}),
        phase("b", 5 * 10**12, 32768),
    )
    assert len(schedule.step_runs) < 60
    middle = schedule.step_start(7 * 10**12)
    assert schedule.at(middle).step_tokens == 4_194_304 + 33 * 262_144


@pytest.mark.parametrize("consumed", [-64, 1, 640])
def test_clock_off_the_steps_is_refused(consumed) -> None:
    with pytest.raises(ValueError, match=str(consumed)):
        compile_phases(phase("a", 640, 8, **START)).at(consumed)


def test_phase_shorter_than_one_sample_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"phases\[b\].tokens=7 leaves no room"):
        compile_phases(phase("a", 640, 8, **START), phase("b", 7, 8))


def test_first_phase_without_a_curve_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"phases\[a\].learning_rate: no value"):
        compile_phases(phase("a", 640, 8, mixture={"a": 1.0}, global_batch_tokens=64))


@given(curricula(), curricula(), st.floats(0, 1))
@settings(max_examples=150)
def test_amendment_changes_the_future_only(curriculum, other, where) -> None:
    before = build_schedule(curriculum)
    plans = steps_of(before)
    cut = plans[int(where * (len(plans) - 1))].consumed_tokens
    assume(cut < sum(p.tokens for p in other.phases) - max(p.seq_length for p in other.phases))
    after = build_schedule([Edition(0, curriculum), Edition(cut, other)])
    amended = steps_of(after)
    shared = [plan for plan in plans if plan.consumed_tokens < cut]
    assert amended[: len(shared)] == shared
    assert amended[len(shared)].consumed_tokens == cut


def test_amendment_that_ends_before_it_begins_is_refused() -> None:
    curriculum = Curriculum.model_validate({"phases": [phase("a", 6400, 8, **START)]})
    shorter = Curriculum.model_validate({"phases": [phase("a", 640, 8, **START)]})
    with pytest.raises(RecipeError, match="ends before token 3200"):
        build_schedule([Edition(0, curriculum), Edition(3200, shorter)])


def test_amendment_off_a_steps_edge_is_refused() -> None:
    curriculum = Curriculum.model_validate({"phases": [phase("a", 640, 8, **START)]})
    with pytest.raises(RecipeError, match="no step starts at token 65"):
        build_schedule([Edition(0, curriculum), Edition(65, curriculum)])


@given(st.sampled_from(["linear", "cosine", "step"]), st.floats(0, 0.9), st.floats(0.01, 0.1))
def test_mean_progress_is_the_mean_of_progress(shape, start, width) -> None:
    grid = [progress(shape, start + width * (i + 0.5) / 4000) for i in range(4000)]
    assert mean_progress(shape, start, start + width) == pytest.approx(sum(grid) / 4000, abs=1e-4)


def test_next_change_finds_the_first_token_of_the_next_value() -> None:
    curve = Curve((Ramp(0, 1000, 64, 128, "linear", 32), Ramp(1000, 1000, 256, 256, "step")))
    assert curve.next_change(0, 5000) == 500
    assert curve.next_change(500, 5000) == 1000
    assert curve.next_change(1000, 5000) == 5000
