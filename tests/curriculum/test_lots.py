"""Lots on the token axis: the text schedule's contracts, with units of different sizes."""

from __future__ import annotations

import json
from bisect import bisect_left

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_curr.curriculum.differences import schedule_differences
from megatron_curr.curriculum.lattice import LotLattice
from megatron_curr.curriculum.ledger import amend, append_entries, ledger_schedule, open_ledger
from megatron_curr.curriculum.ledger import read_ledger as read
from megatron_curr.curriculum.lots import VideoPlanner
from megatron_curr.curriculum.mixture import MixtureOrder, Segment
from megatron_curr.curriculum.schedule import Edition, Schedule, StepPlan, build_schedule
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.video_schema import VideoRecipe
from tests.curriculum.video_curricula import video_recipe, video_recipes

START = {"mixture": {"a": 1.0, "b": 1.0, "c": 1.0}, "learning_rate": 1e-3}
EVEN = {"image": 1.0, "clip": 1.0, "wide": 1.0}


def compiled(recipe: VideoRecipe) -> tuple[Schedule, VideoPlanner]:
    planner = VideoPlanner(recipe)
    return build_schedule(recipe.curriculum, planner), planner


def steps_of(schedule: Schedule, start_tokens: int = 0) -> list[StepPlan]:
    plans, clock = [], start_tokens
    while clock < schedule.total_tokens:
        plans.append(schedule.at(clock))
        clock = plans[-1].next_consumed_tokens
    assert clock == schedule.total_tokens
    return plans


@given(st.integers(0, 2**31))
@settings(max_examples=40)
def test_search_finds_the_first_lot_from_a_token_on(seed: int) -> None:
    draws = np.random.default_rng(seed)
    num_cells = int(draws.integers(1, 6))
    segments = []
    for _ in range(draws.integers(1, 5)):
        weights = draws.random(num_cells) ** 3 + 1e-6
        segments.append(Segment(int(draws.integers(1, 60)), weights / weights.sum()))
    lattice = LotLattice(MixtureOrder(segments), draws.integers(1, 500, num_cells))
    num_lots = lattice.mixture.num_samples
    edges = [lattice.tokens_before(lot) for lot in range(num_lots + 1)]
    for tokens in [*edges, *draws.integers(-5, edges[-1] + 50, 40).tolist()]:
        assert lattice.unit_from(tokens) == min(bisect_left(edges, tokens), num_lots)


@given(video_recipes())
@settings(max_examples=15)
def test_steps_tile_the_run_and_clock_and_position_agree(recipe: VideoRecipe) -> None:
    schedule, planner = compiled(recipe)
    plans = steps_of(schedule)
    assert [plan.step for plan in plans] == list(range(schedule.num_steps))
    ends = [plan.position + plan.num_samples for plan in plans]
    assert [plan.position for plan in plans] == [0, *ends[:-1]]
    assert ends[-1] == schedule.total_samples
    assert min(plan.num_samples for plan in plans) >= 1
    for plan in plans:
        assert schedule.position_of(plan.consumed_tokens) == plan.position
        assert schedule.consumed_at(plan.position) == plan.consumed_tokens
        assert schedule.step_start(plan.next_consumed_tokens - 1) == plan.consumed_tokens
    starts = {run.start_tokens: run.step_tokens for run in schedule.step_runs}
    ends = {run.end_tokens for run in schedule.step_runs}
    batch_tokens = 0
    for plan in plans:
        batch_tokens = starts.get(plan.consumed_tokens, batch_tokens)
        if plan.next_consumed_tokens not in ends:
            assert abs(plan.step_tokens - batch_tokens) < planner.lot_tokens.max()


@given(video_recipes())
@settings(max_examples=15)
def test_cells_get_their_tokens_and_phases_their_length(recipe: VideoRecipe) -> None:
    schedule, planner = compiled(recipe)
    lot_tokens, num_cells = planner.lot_tokens, len(planner.cells)
    end_tokens = np.cumsum([phase.tokens for phase in recipe.curriculum.phases])
    for stretch, asked in zip(schedule.stretches, end_tokens, strict=True):
        # A cell's total is rounded to lots, up or down.
        assert abs(stretch.end_tokens - asked) <= num_cells / 2 * lot_tokens.max()
        mixture = stretch.lattice.mixture
        ramps = (stretch.curves.mixture, stretch.curves.buckets)
        if any(ramp.shape != "step" and not ramp.constant for c in ramps for ramp in c.ramps):
            continue
        weights = planner.cell_weights(
            stretch.curves, stretch.start_tokens, stretch.start_tokens + 1
        )
        for index in range(mixture.num_samples + 1):
            counts = mixture.counts(index)
            assert counts.sum() == index
            target = weights / lot_tokens / (weights / lot_tokens).sum() * index
            assert np.abs(counts - target).max() <= 2


def test_shares_are_of_tokens_and_a_source_shares_out_its_own() -> None:
    phase = {"name": "p", "tokens": 400_000, "buckets": EVEN, "global_batch_tokens": 4000}
    schedule, planner = compiled(
        video_recipe([{**phase, **START, "mixture": {"a": 0.5, "b": 0.3, "c": 0.2}}])
    )
    lots = schedule.stretches[0].lattice.mixture.totals
    shares = lots * planner.lot_tokens / schedule.total_tokens
    assert [cell.name for cell in planner.cells] == [
        "a/clip", "a/image", "b/clip", "b/wide", "c/wide"
    ]  # fmt: skip
    assert shares == pytest.approx([0.25, 0.25, 0.15, 0.15, 0.2], abs=2e-3)


def test_a_ramp_of_buckets_moves_tokens_as_its_integral_says() -> None:
    start = {"image": 1.0, "clip": 1e-9, "wide": 1e-9}
    ramp = {"from": start, "to": {"image": 1e-9, "clip": 1.0, "wide": 1e-9}}
    phase = {"name": "p", "tokens": 300_000, "buckets": ramp, "global_batch_tokens": 4000}
    schedule, planner = compiled(video_recipe([{**phase, **START, "mixture": {"a": 1.0}}]))
    halfway = schedule.position_of(schedule.total_tokens // 2)
    tokens = schedule.stretches[0].lattice.mixture.counts(halfway) * planner.lot_tokens
    assert tokens[:2] / tokens.sum() == pytest.approx([0.25, 0.75], abs=0.01)


@given(video_recipes(), video_recipes(), st.floats(0, 1))
@settings(max_examples=10)
def test_amendment_changes_the_future_only(
    recipe: VideoRecipe, other: VideoRecipe, where: float
) -> None:
    schedule, planner = compiled(recipe)
    plans = steps_of(schedule)
    cut = plans[int(where * (len(plans) - 1))].consumed_tokens
    if cut > sum(phase.tokens for phase in other.curriculum.phases) - 200:
        return
    editions = [Edition(0, recipe.curriculum), Edition(cut, other.curriculum)]
    amended = build_schedule(editions, planner)
    after = steps_of(amended)
    shared = [plan for plan in plans if plan.consumed_tokens < cut]
    assert after[: len(shared)] == shared
    assert after[len(shared)].consumed_tokens == cut
    assert [plan.step for plan in after] == list(range(amended.num_steps))


def test_differences_name_shapes_and_tasks() -> None:
    phase = {"name": "p", "tokens": 4000, "buckets": EVEN, "global_batch_tokens": 400, **START}
    (old, _), (new, _) = (
        compiled(video_recipe([{**phase, **change}]))
        for change in ({}, {"buckets": {**EVEN, "wide": 4.0}, "tasks": {"t2v": 0.5, "i2v": 0.5}})
    )
    named = {change.what for change in schedule_differences(old, new)}
    assert {"buckets.wide", "buckets.clip", "tasks.i2v"} <= named
    assert "seq_length" not in named


def test_ledger_keeps_video_curricula(tmp_path) -> None:
    phase = {"name": "p", "tokens": 4000, "buckets": EVEN, "global_batch_tokens": 400, **START}
    recipe = video_recipe([phase])
    planner = VideoPlanner(recipe)
    ledger = open_ledger(recipe.curriculum)
    edge = ledger_schedule(ledger, planner).at(0).next_consumed_tokens
    longer = video_recipe([{**phase, "tokens": 8000}]).curriculum
    ledger = amend(ledger, longer, from_tokens=edge, reason="more", planner=planner)
    append_entries(tmp_path / "ledger.jsonl", ledger)
    assert read(tmp_path / "ledger.jsonl") == ledger
    assert json.loads(ledger[0].line())["curriculum"]["phases"][0]["tasks"] == {"t2v": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"global_batch_tokens": 150},
            "holds no lot of b/wide, 4 samples of 40 tokens; make",
        ),
        ({"tokens": 159}, "leaves no room for one lot of b/wide"),
        ({"buckets": {"image": 1.0}}, "'b' has weight in the mixture, but none of its buckets"),
    ],
)
def test_what_cannot_be_dealt_is_refused(change: dict[str, object], message: str) -> None:
    phase = {"name": "p", "tokens": 4000, "buckets": EVEN, "global_batch_tokens": 400, **START}
    with pytest.raises(RecipeError, match=message):
        compiled(video_recipe([{**phase, **change}]))
