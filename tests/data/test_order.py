"""The sample order: a bijection, no replay, the same whatever reads it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_curr.curriculum.ledger import open_ledger, parse_ledger
from megatron_curr.curriculum.schedule import Edition, build_schedule
from megatron_curr.data.order import SampleOrder, Samples
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.phases import Curriculum
from megatron_curr.recipe.schema import Source
from tests.curriculum.curricula import SOURCES, curricula
from tests.recipe.recipes import with_keys_shuffled

sizes = st.fixed_dictionaries({name: st.integers(1000, 9000) for name in SOURCES})


def sources(**settings: object) -> dict[str, Source]:
    return {
        name: Source.model_validate({"shards": name, "max_epochs": 1e6, **settings})
        for name in (*SOURCES, "late")
    }


def build(curriculum, tokens, *, seed=1, chunk_tokens=None, **settings: object) -> SampleOrder:
    return SampleOrder(
        build_schedule(curriculum),
        {"late": 5000, **tokens},
        seed=seed,
        sources=sources(**settings),
        chunk_tokens=chunk_tokens,
    )


def everything(order: SampleOrder) -> Samples:
    return order.lookup(np.arange(order.schedule.total_samples))


def assert_no_replay(order: SampleOrder, samples: Samples) -> None:
    """Inside one epoch no token of a source is read twice."""
    for source in range(len(order.sources)):
        for epoch in np.unique(samples.epoch[samples.source == source]):
            here = (samples.source == source) & (samples.epoch == epoch)
            by_start = np.argsort(samples.first_token[here])
            starts = samples.first_token[here][by_start]
            ends = starts + samples.seq_length[here][by_start]
            assert np.all(starts[1:] >= ends[:-1])
            assert starts[0] >= 0 and ends[-1] < order.num_tokens[source]


def flat(**curves: object) -> Curriculum:
    phase = {"name": "a", "tokens": 64_000, "seq_length": 32, "mixture": {"prose": 1.0}}
    phase |= {"global_batch_tokens": 320, "learning_rate": 1.0}
    return Curriculum.model_validate({"phases": [{**phase, **curves}]})


@given(curricula(), sizes)
@settings(max_examples=100)
def test_no_token_is_read_twice_in_an_epoch(curriculum, tokens) -> None:
    order = build(curriculum, tokens)
    assert_no_replay(order, everything(order))


@given(curricula(), sizes)
@settings(max_examples=60)
def test_epochs_of_a_source_follow_each_other(curriculum, tokens) -> None:
    order = build(curriculum, tokens)
    samples = everything(order)
    for source in range(len(order.sources)):
        epochs = samples.epoch[samples.source == source]
        assert np.all(np.diff(epochs) >= 0) and np.all(np.diff(epochs) <= 1)


@given(curricula(max_samples=150), sizes, st.integers(0, 2**31))
@settings(max_examples=60)
def test_positions_of_finds_each_sample_again(curriculum, tokens, pick) -> None:
    order = build(curriculum, tokens)
    samples = everything(order)
    number = pick % len(samples.position)
    name = order.sources[samples.source[number]]
    first = int(samples.first_token[number]) + pick % int(samples.seq_length[number])
    found = order.positions_of(name, first, 5)
    same_source = samples.source == samples.source[number]
    overlap = (samples.first_token < first + 5) & (
        samples.first_token + samples.seq_length + 1 > first
    )
    assert found.tolist() == samples.position[same_source & overlap].tolist()


@given(curricula(), sizes, st.integers(0, 2**31))
@settings(max_examples=60)
def test_order_does_not_depend_on_how_it_is_asked(curriculum, tokens, pick) -> None:
    order = build(curriculum, tokens)
    whole = everything(order)
    some = np.random.default_rng(pick).permutation(order.schedule.total_samples)[:50]
    part = build(curriculum, tokens).lookup(some)
    assert np.array_equal(part.first_token, whole.first_token[some])
    assert np.array_equal(part.source, whole.source[some])


@st.composite
def ties(draw: st.DrawFn) -> dict[str, Any]:
    """Phases over up to seven sources, most of them with the same weight as others."""
    names = draw(st.lists(st.sampled_from("abcdefg"), min_size=2, unique=True))
    table = st.fixed_dictionaries({name: st.sampled_from([1.0, 1.0, 2.0]) for name in names})
    phases = []
    for number in range(draw(st.integers(1, 3))):
        mixture = draw(table)
        if draw(st.booleans()):
            mixture = {"from": draw(table), "to": mixture}
        phase = {"name": f"p{number}", "tokens": 32 * draw(st.integers(1, 200)), "seq_length": 32}
        phases.append({**phase, "mixture": mixture, "global_batch_tokens": 64})
    phases[0]["learning_rate"] = 1.0
    return {"phases": phases}


def order_of_names(editions: list[Edition], names: str) -> SampleOrder:
    """The order where a mapping of these names, in this order, gives sources and sizes."""
    known = {name: Source(shards=name, max_epochs=9.0, on_exhausted="reweight") for name in names}
    return SampleOrder(build_schedule(editions), dict.fromkeys(names, 5000), seed=1, sources=known)


def started(values: dict[str, Any]) -> list[Edition]:
    """A run that this curriculum starts."""
    return [Edition(0, Curriculum.model_validate(values))]


def by_name(order: SampleOrder, end: int) -> list[tuple[str, int, int]]:
    """(source, epoch, first token) of the first samples."""
    found = order.lookup(np.arange(end))
    sources = [order.sources[source] for source in found.source]
    return list(zip(sources, found.epoch.tolist(), found.first_token.tolist(), strict=True))


@given(ties(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_keys_moves_no_sample_where_weights_tie(curriculum, random) -> None:
    order = order_of_names(started(curriculum), "abcdefg")
    total = order.schedule.total_samples
    shuffled = with_keys_shuffled(curriculum, random)
    assert by_name(order_of_names(started(shuffled), "gfedcba"), total) == by_name(order, total)
    (entry,) = open_ledger(Curriculum.model_validate(shuffled))
    line = json.dumps(with_keys_shuffled(json.loads(entry.line()), random)) + "\n"
    (kept,) = parse_ledger(line, Path("ledger.jsonl"))
    again = kept.edition.curriculum.model_dump(mode="json", by_alias=True)
    assert by_name(order_of_names(started(again), "abcdefg"), total) == by_name(order, total)


@given(ties(), ties(), st.floats(0, 1))
@settings(max_examples=30)
def test_a_source_that_an_amendment_brings_breaks_no_tie_of_the_past(first, second, where) -> None:
    order = order_of_names(started(first), "abcdefg")
    schedule = order.schedule
    cut = schedule.step_start(int(where * (schedule.total_tokens - 1)))
    assume(cut < sum(phase["tokens"] for phase in second["phases"]) - 32)
    editions = [*started(first), Edition(cut, Curriculum.model_validate(second))]
    known = {
        name: Source(shards=name, max_epochs=9.0, on_exhausted="reweight") for name in "gfedcba"
    }
    after = SampleOrder(
        build_schedule(editions), dict.fromkeys("gfedcba", 5000), seed=1, sources=known
    )
    past = schedule.position_of(cut)
    assert by_name(after, past) == by_name(order, past)


@given(curricula(), sizes)
@settings(max_examples=60)
def test_counts_agree_with_the_samples(curriculum, tokens) -> None:
    order = build(curriculum, tokens)
    samples = everything(order)
    for position in {0, 1, len(samples.position) // 3, len(samples.position)}:
        counts = np.bincount(samples.source[:position], minlength=len(order.sources))
        assert np.array_equal(order.counts(position), counts)
        read = np.bincount(
            samples.source[:position], samples.seq_length[:position], minlength=len(order.sources)
        )
        assert list(order.consumed_tokens(position).values()) == read.tolist()


@given(curricula(), curricula(), sizes, st.floats(0, 1))
@settings(max_examples=60)
def test_amendment_moves_no_sample_before_it_and_replays_none_after(
    curriculum, other, tokens, where
) -> None:
    before = build(curriculum, tokens, chunk_tokens=32)
    cut = before.schedule.step_start(int(where * (before.schedule.total_tokens - 1)))
    assume(cut < sum(p.tokens for p in other.phases) - 32)
    editions = [Edition(0, curriculum), Edition(cut, other)]
    after = build(editions, tokens, chunk_tokens=32)
    past = np.arange(before.schedule.position_of(cut)) if cut else np.arange(0)
    assert np.array_equal(before.lookup(past).first_token, after.lookup(past).first_token)
    assert_no_replay(after, everything(after))


def test_new_source_does_not_move_the_others() -> None:
    tokens = dict.fromkeys(SOURCES, 60_000)
    before = build(flat(), tokens)
    with_late = flat(mixture={"prose": 0.5, "late": 0.5})
    after = build([Edition(0, flat()), Edition(6400, with_late)], tokens)
    samples = everything(after)
    assert after.sources == ("late", "prose")
    prose = samples.first_token[samples.source == 1]
    assert np.array_equal(prose, everything(before).first_token[: len(prose)])
    assert set(samples.source[:200]) == {1} and set(samples.source[200:]) == {0, 1}


def test_whole_source_is_read_before_any_of_it_is_read_again() -> None:
    order = build(flat(), {"prose": 32_001})  # 1000 windows, two epochs
    samples = everything(order)
    assert np.array_equal(np.sort(samples.first_token[:1000]), np.arange(1000) * 32)
    assert np.array_equal(np.sort(samples.first_token[1000:]), np.arange(1000) * 32)
    assert not np.array_equal(samples.first_token[:1000], samples.first_token[1000:])


def test_change_of_length_skips_at_most_a_thousandth_of_a_source() -> None:
    phases = [
        {"name": f"p{i}", "tokens": 80_000 + 1000 * i, "seq_length": length}
        for i, length in enumerate((8, 32))
    ]
    phases[0] |= {"mixture": {"prose": 1.0}, "global_batch_tokens": 32, "learning_rate": 1.0}
    order = build(Curriculum.model_validate({"phases": phases}), {"prose": 200_000})
    assert 0 <= order.crumbs[0] <= 200
    assert_no_replay(order, everything(order))


def test_shards_are_drawn_in_proportion_to_their_size() -> None:
    order = build(flat(), {"prose": 200_001})
    starts = everything(order).first_token  # 2000 of 6250 windows
    tenth = np.bincount(starts * 10 // 200_001, minlength=10)
    assert np.abs(tenth - 200).max() < 5 * np.sqrt(200)


def test_seed_changes_the_order_and_nothing_else() -> None:
    one, two = (everything(build(flat(), {"prose": 70_000}, seed=s)) for s in (1, 2))
    assert np.array_equal(one.source, two.source)
    assert not np.array_equal(one.first_token, two.first_token)


def test_source_past_its_epoch_cap_is_refused_with_the_number() -> None:
    with pytest.raises(RecipeError, match=r"prose would be read more than max_epochs=1.5 times"):
        build(flat(), {"prose": 32_001}, max_epochs=1.5)


def test_exhausted_source_can_stop_the_run_at_a_whole_step() -> None:
    order = build(flat(), {"prose": 32_001}, max_epochs=1.5, on_exhausted="stop")
    assert order.schedule.total_samples == 1500
    assert len(everything(order).position) == 1500


def test_exhausted_source_can_leave_its_share_to_the_others() -> None:
    mixture = {"prose": 0.5, "code": 0.3, "math": 0.2}
    tokens = {"prose": 16_001, "code": 900_000, "math": 900_000}
    order = build(flat(mixture=mixture), tokens, max_epochs=1.0, on_exhausted="reweight")
    samples = everything(order)
    prose = np.flatnonzero(samples.source == order.sources.index("prose"))
    assert len(prose) == 500
    after = samples.source[prose[-1] + 1 :]
    assert abs((after == order.sources.index("code")).sum() - 0.6 * len(after)) <= 2
    assert_no_replay(order, samples)


def test_reweighting_with_no_source_left_is_refused() -> None:
    with pytest.raises(RecipeError, match="max_epochs=1 times"):
        build(flat(), {"prose": 32_001}, max_epochs=1.0, on_exhausted="reweight")


def test_unknown_source_is_named() -> None:
    with pytest.raises(RecipeError, match=r"'poetry'.*known sources: code, late, math, prose"):
        build(flat(mixture={"poetry": 1.0}), {"poetry": 5000})


def test_source_smaller_than_a_window_is_named() -> None:
    with pytest.raises(RecipeError, match=r"prose holds 32 tokens, fewer than one window of 32"):
        build(flat(), {"prose": 32})


def test_longer_window_in_an_amendment_needs_room_reserved() -> None:
    longer = flat(seq_length=64, tokens=128_000)
    editions = [Edition(0, flat()), Edition(6400, longer)]
    with pytest.raises(RecipeError, match=r"set data.chunk_tokens"):
        build(editions, {"prose": 90_000})
    order = build(editions, {"prose": 90_000}, chunk_tokens=64)
    assert_no_replay(order, everything(order))
