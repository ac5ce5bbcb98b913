"""Sources that leave their share to others: shapes stay, quotas hold, nothing is read twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_curr.curriculum.lots import VideoPlanner
from megatron_curr.curriculum.mixture import MixtureOrder, Segment
from megatron_curr.curriculum.schedule import Edition, build_schedule
from megatron_curr.data.lot_owners import LotOwners
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.video_schema import VideoRecipe
from tests.curriculum.video_curricula import video_recipe, video_recipes
from tests.data.test_video_order import CLIPS, PHASE, assert_no_replay, order_of, visits

MANY = 10**6
# b has few of what c has too, a of what b has; images have no second source.
FEW = {"a/image": MANY, "a/clip": 13, "b/clip": MANY, "b/wide": 11, "c/wide": MANY}


def owners_of(order: VideoOrder) -> list[int]:
    return [order.lot(at).cell for at in range(order.schedule.total_samples)]


def replaced(recipe: VideoRecipe, **source: object) -> VideoRecipe:
    values = recipe.model_dump(mode="json", by_alias=True)
    for settings_of in values["data"]["sources"].values():
        settings_of.update(source)
    return VideoRecipe.model_validate(values)


@given(st.integers(0, 2**31))
@settings(max_examples=25)
def test_lots_of_a_used_up_cell_go_to_its_bucket_by_weight(seed: int) -> None:
    draws = np.random.default_rng(seed)
    bucket_of = np.array([0, 0, 0, 0, 1, 1])
    segments = []
    for _ in range(draws.integers(1, 4)):
        weights = draws.random(6) ** 2 + 0.02
        segments.append(Segment(int(draws.integers(20, 150)), weights / weights.sum()))
    mixture = MixtureOrder(segments)
    owners = LotOwners(mixture, bucket_of)
    planned = mixture.pick(np.arange(mixture.num_samples))[0]
    ends = np.sort(draws.choice(np.flatnonzero(bucket_of[planned] == 0), 2))
    gone = dict(zip(draws.permutation(4)[:2].tolist(), ends.tolist(), strict=True))
    assert all(owners.use_up(cell, lot) for cell, lot in gone.items())
    found = [owners.owner(lot) for lot in range(mixture.num_samples)]
    cells = np.array([cell for cell, _ in found])
    assert (bucket_of[cells] == bucket_of[planned]).all()
    first = min(gone.values())
    assert (cells[:first] == planned[:first]).all()
    assert (cells[bucket_of[planned] == 1] == planned[bucket_of[planned] == 1]).all()
    for cell, lot in gone.items():
        assert not (cells[lot:] == cell).any()
    for cell in range(6):
        mine = np.flatnonzero(cells == cell)
        assert [rank for owner, rank in found if owner == cell] == list(range(len(mine)))
        assert (owners.lots_of(cell, np.arange(len(mine))) == mine).all()
    for lot in (0, first, *draws.integers(0, mixture.num_samples, 5).tolist(), len(cells)):
        assert (owners.counts(lot) == np.bincount(cells[:lot], minlength=6)).all()
    # From where the last one is gone, the two left share the bucket as their weights stand.
    last, (one, other) = max(gone.values()), [c for c in range(4) if c not in gone]
    target = seen = 0.0
    segment_of = np.searchsorted(mixture.starts, np.arange(len(cells)), side="right") - 1
    for lot in range(last, len(cells)):
        if bucket_of[planned[lot]] == 0:
            weights = segments[segment_of[lot]].weights
            target += weights[one] / (weights[one] + weights[other])
            seen += cells[lot] == one
            assert abs(seen - target) <= 2


@given(video_recipes(max_phases=2), st.sampled_from([1.0, 2.5]))
@settings(max_examples=8)
def test_the_contracts_of_the_order_hold_where_sources_run_out(recipe, most) -> None:
    free = order_of(recipe, FEW)
    order = order_of(replaced(recipe, max_epochs=most, on_exhausted="reweight"), FEW)
    assert order.schedule.total_samples == free.schedule.total_samples
    assert order.schedule.step_runs == free.schedule.step_runs
    cells, planned = owners_of(order), owners_of(free)
    buckets = [cell.bucket for cell in order.cells]
    assert [buckets[cell] for cell in cells] == [buckets[cell] for cell in planned]
    read = order.lots_before(order.schedule.total_samples) * order._lot_samples
    assert (read <= most * order.num_clips).all()
    assert_no_replay(order)
    for cell, rows in visits(order).items():
        back = order.visits_of(cell, 3)
        assert back[:, 0].tolist() == [at for _, clip, at in rows if clip == 3]
    for position in (1, len(cells) // 2, len(cells)):
        counted = np.bincount(cells[:position], minlength=len(order.cells))
        assert (order.lots_before(position) == counted).all()


def test_what_was_read_stays_when_the_future_is_amended_past_an_exhaustion() -> None:
    spare = {"max_epochs": 1.0, "on_exhausted": "reweight"}
    recipe = video_recipe([PHASE], **spare)
    other = video_recipe([{**PHASE, "mixture": {"a": 0.6, "b": 0.2, "c": 0.2}}], **spare)
    planner = VideoPlanner(recipe)
    before = order_of(recipe, FEW)
    assert owners_of(before) != owners_of(order_of(video_recipe([PHASE]), FEW))
    for wanted in (1000, 3000, 5000):
        edge = before.schedule.step_start(wanted)
        editions = [Edition(0, recipe.curriculum), Edition(edge, other.curriculum)]
        schedule = build_schedule(editions, planner)
        after = VideoOrder(schedule, FEW, recipe=recipe, planner=planner)
        shared = before.schedule.position_of(edge)
        for position in range(shared):
            ours, theirs = after.lot(position), before.lot(position)
            assert (ours.cell, ours.clip.tolist()) == (theirs.cell, theirs.clip.tolist())
        assert_no_replay(after)


def test_a_bucket_without_another_source_has_no_one_to_leave_its_share_to() -> None:
    recipe = video_recipe([PHASE], max_epochs=2.0, on_exhausted="reweight")
    with pytest.raises(RecipeError, match=r"bucket 'image' .*no other source has weight there"):
        order_of(recipe, {**FEW, "a/image": CLIPS["a/image"]})
