"""Lots both ways: exact quotas, every clip once an epoch, nothing read twice before all is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_curr.curriculum.lots import VideoPlanner
from megatron_curr.curriculum.schedule import Edition, build_schedule
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.video_schema import VideoRecipe
from tests.curriculum.video_curricula import video_recipe, video_recipes
from tests.recipe.recipes import with_keys_shuffled

PHASE = {
    "name": "p",
    "tokens": 6000,
    "mixture": {"a": 1.0, "b": 1.0, "c": 1.0},
    "buckets": {"image": 1.0, "clip": 1.0, "wide": 1.0},
    "global_batch_tokens": 400,
    "learning_rate": 1e-3,
}
CLIPS = {"a/image": 29, "a/clip": 13, "b/clip": 17, "b/wide": 11, "c/wide": 10}


def order_of(
    recipe: VideoRecipe,
    num_clips: dict[str, int] = CLIPS,
    amended: tuple[int, VideoRecipe] | None = None,
) -> VideoOrder:
    planner = VideoPlanner(recipe)
    editions = [Edition(0, recipe.curriculum)]
    if amended:
        editions.append(Edition(amended[0], amended[1].curriculum))
    return VideoOrder(build_schedule(editions, planner), num_clips, recipe=recipe, planner=planner)


def visits(order: VideoOrder) -> dict[int, list[tuple[int, int, int]]]:
    """By cell, every (epoch, clip, position) in the order of the run."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for position in range(order.schedule.total_samples):
        lot = order.lot(position)
        rows = zip(lot.epoch.tolist(), lot.clip.tolist(), strict=True)
        found.setdefault(lot.cell, []).extend((*row, position) for row in rows)
    return found


def tied_recipe(names: str, buckets: tuple[str, ...]) -> dict[str, Any]:
    """Sources of one weight and of three shapes each, as the values of a recipe."""
    values = video_recipe([{**PHASE, "mixture": dict.fromkeys(names, 1.0)}]).model_dump(mode="json")
    source = {"shards": "x", "buckets": buckets, "max_epochs": 2.0, "on_exhausted": "reweight"}
    values["data"]["sources"] = {name: {**source, "shards": name} for name in names}
    return values


def by_name(order: VideoOrder, end: int) -> list[tuple[str, list[int]]]:
    """(cell, its clips) of the first lots."""
    lots = [order.lot(position) for position in range(end)]
    return [(order.cells[lot.cell].name, lot.clip.tolist()) for lot in lots]


# The clips of b are soon used up, and its lots go to the others.
EVERY_CELL = {
    f"{name}/{bucket}": 19 if name == "b" else 300
    for name in "abcd"
    for bucket in ("image", "clip", "wide")
}


@given(st.randoms(use_true_random=False), st.permutations(["image", "clip", "wide"]))
@settings(max_examples=12)
def test_the_order_of_keys_moves_no_lot_where_weights_tie(random, buckets) -> None:
    values = tied_recipe("dbca", tuple(buckets))
    order = order_of(VideoRecipe.model_validate(values, strict=False), EVERY_CELL)
    shuffled = with_keys_shuffled(values, random)
    for source in shuffled["data"]["sources"].values():
        source["buckets"] = random.sample(buckets, 3)
    again = order_of(VideoRecipe.model_validate(shuffled, strict=False), EVERY_CELL)
    total = order.schedule.total_samples
    assert again.schedule.total_samples == total
    assert by_name(again, total) == by_name(order, total)


@given(st.integers(1, 14))
@settings(max_examples=8)
def test_a_source_that_an_amendment_brings_breaks_no_tie_of_the_past(num_steps) -> None:
    three = ("image", "clip", "wide")
    few = VideoRecipe.model_validate(tied_recipe("bcd", three), strict=False)
    many = VideoRecipe.model_validate(tied_recipe("abcd", three), strict=False)
    before = order_of(few, EVERY_CELL)
    cut = before.schedule.step_start(400 * num_steps)
    editions = [Edition(0, few.curriculum), Edition(cut, many.curriculum)]
    planner = VideoPlanner(many)
    schedule = build_schedule(editions, planner)
    after = VideoOrder(schedule, EVERY_CELL, recipe=many, planner=planner)
    past = before.schedule.position_of(cut)
    assert by_name(after, past) == by_name(before, past)


def assert_no_replay(order: VideoOrder) -> None:
    for cell, rows in visits(order).items():
        epochs = [epoch for epoch, _, _ in rows]
        assert epochs == sorted(epochs)
        for epoch in set(epochs):
            clips = [clip for at, clip, _ in rows if at == epoch]
            assert len(set(clips)) == len(clips)
            if epoch < max(epochs):
                assert len(clips) == order.num_clips[cell]


@given(video_recipes(max_phases=2), st.lists(st.integers(12, 60), min_size=5, max_size=5))
@settings(max_examples=8)
def test_a_cell_is_read_whole_before_any_clip_again_across_phases(recipe, sizes) -> None:
    assert_no_replay(order_of(recipe, dict(zip(CLIPS, sizes, strict=True))))


@given(video_recipes(max_phases=2))
@settings(max_examples=8)
def test_position_to_clip_and_back(recipe) -> None:
    order = order_of(recipe)
    for cell, rows in visits(order).items():
        for clip in (0, int(order.num_clips[cell]) - 1):
            back = order.visits_of(cell, clip)
            assert back[:, 0].tolist() == [at for _, found, at in rows if found == clip]
            for position, place in back.tolist():
                assert order.lot(position).clip[place] == clip


def test_an_amendment_repeats_no_clip_and_moves_no_lot() -> None:
    recipe = video_recipe([PHASE])
    before = order_of(recipe)
    edge = before.schedule.step_start(2500)
    other = video_recipe([{**PHASE, "mixture": {"a": 0.2, "b": 0.1, "c": 0.7}}])
    after = order_of(recipe, amended=(edge, other))
    for position in range(before.schedule.position_of(edge)):
        ours, theirs = after.lot(position), before.lot(position)
        assert (ours.cell, ours.clip.tolist()) == (theirs.cell, theirs.clip.tolist())
    assert_no_replay(after)


def test_sample_ids_tell_visits_apart() -> None:
    order = order_of(video_recipe([PHASE]))
    ids = np.concatenate([order.lot(at).sample_ids for at in range(order.schedule.total_samples)])
    assert len(np.unique(ids)) == len(ids)


def test_consumed_tokens_of_sources_and_buckets_add_up_to_the_clock() -> None:
    order = order_of(video_recipe([PHASE]))
    for position in (0, 1, 17, order.schedule.total_samples):
        clock = order.schedule.total_tokens
        if position < order.schedule.total_samples:
            clock = order.schedule.consumed_at(position)
        assert sum(order.consumed_tokens(position).values()) == clock
        assert sum(order.bucket_tokens(position).values()) == clock
    read = sum(len(rows) for rows in visits(order).values())
    assert read == sum(order.lots_before(order.schedule.total_samples) * order._lot_samples)


def test_epochs_are_shuffled_anew() -> None:
    rows = visits(order_of(video_recipe([PHASE])))[0]
    first, second = ([clip for epoch, clip, _ in rows if epoch == n] for n in (0, 1))
    assert sorted(first) == sorted(second) and first != second


def test_source_past_its_epochs_is_refused_or_ends_the_run() -> None:
    with pytest.raises(RecipeError, match=r"a: bucket 'clip' would be read more than max_epochs"):
        order_of(video_recipe([PHASE], max_epochs=2.0))
    order = order_of(video_recipe([PHASE], max_epochs=2.0, on_exhausted="stop"))
    schedule = order.schedule
    assert 0 < schedule.total_tokens < 6000
    assert schedule.step_start(schedule.total_tokens) == schedule.total_tokens
    assert (order.lots_before(schedule.total_samples) * order._lot_samples
            <= 2 * order.num_clips).all()  # fmt: skip


@pytest.mark.parametrize(
    ("num_clips", "message"),
    [(0, "bucket 'wide' has no sample in its shards"), (3, "has 3 samples, fewer than the 4 of")],
)
def test_bucket_without_clips_for_a_lot_is_refused(num_clips: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        order_of(video_recipe([PHASE]), {**CLIPS, "c/wide": num_clips})
