"""Exact quotas: at every prefix each source has what its weight promises."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_curr.curriculum.curves import Curve, Ramp
from megatron_curr.curriculum.mixture import (
    MAX_SEGMENT_SAMPLES,
    MixtureOrder,
    QuotaTree,
    Segment,
    largest_remainder,
    mixture_segments,
)

SLACK_SAMPLES = 2


def prefix_counts(order: MixtureOrder) -> np.ndarray:
    """[num_samples + 1, num_sources] samples of each source before every index."""
    source, _ = order.pick(np.arange(order.num_samples))
    drawn = np.zeros((order.num_samples + 1, order.edges.shape[1]), np.int64)
    drawn[np.arange(order.num_samples) + 1, source] = 1
    return drawn.cumsum(axis=0)


def prefix_targets(segments: list[Segment]) -> np.ndarray:
    """[num_samples + 1, num_sources] integral of the weights before every index."""
    rows = [np.repeat(s.weights[None], s.num_samples, axis=0) for s in segments]
    return np.concatenate([np.zeros((1, len(segments[0].weights))), np.concatenate(rows)]).cumsum(0)


def normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


many_weights = st.one_of(
    hnp.arrays(np.float64, st.integers(1, 80), elements=st.floats(1e-6, 1.0)),
    st.integers(1, 300).map(np.ones),
    st.integers(1, 16).map(lambda n: 1.618 ** np.arange(n)),
    st.integers(1, 40).map(lambda n: np.geomspace(1e-6, 1.0, n)),
)


@given(many_weights, st.integers(1, 3000))
@settings(max_examples=150)
def test_every_prefix_is_within_two_samples_of_its_target(weights, num_samples) -> None:
    segments = [Segment(num_samples, normalised(weights))]
    off = np.abs(prefix_counts(MixtureOrder(segments)) - prefix_targets(segments))
    assert off.max() <= SLACK_SAMPLES


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(0, 10**6)), min_size=1, max_size=30))
@settings(max_examples=100)
def test_staircase_of_weights_is_within_two_samples_everywhere(steps) -> None:
    shares = [normalised(np.random.default_rng(seed).random(7) ** 4) for _, seed in steps]
    segments = [Segment(size, share) for (size, _), share in zip(steps, shares, strict=True)]
    off = np.abs(prefix_counts(MixtureOrder(segments)) - prefix_targets(segments))
    assert off.max() <= SLACK_SAMPLES


def test_five_thousand_sources_keep_their_quotas() -> None:
    rng = np.random.default_rng(0)
    weights = normalised(np.concatenate([[0.3, 0.2], 10 ** rng.uniform(-6, 0, 4998) / 1000]))
    order = MixtureOrder([Segment(40_000, weights)])
    source, _ = order.pick(np.arange(40_000))
    for prefix in (1, 10, 999, 5_000, 12_345, 39_999, 40_000):
        counts = np.bincount(source[:prefix], minlength=5000)
        assert np.abs(counts - prefix * weights).max() <= SLACK_SAMPLES
        assert np.array_equal(counts, order.counts(prefix))


def test_tiny_weights_are_not_starved() -> None:
    weights = np.full(1001, 1e-6)
    weights[0] = 1 - 1e-3
    order = MixtureOrder([Segment(2_000_000, weights)])
    assert np.all(order.totals[1:] == 2)
    # Their samples are spread over the phase, not heaped at one end.
    where = np.concatenate([order.index_of(s, np.arange(2)) for s in range(1, 1001)])
    assert np.histogram(where, bins=4, range=(0, 2_000_000))[0].min() > 400


@given(many_weights, st.integers(1, 2000))
@settings(max_examples=60)
def test_pick_and_index_of_are_inverse(weights, num_samples) -> None:
    half = num_samples // 2
    shares = normalised(weights)
    segments = [Segment(half, shares)] if half else []
    order = MixtureOrder([*segments, Segment(num_samples - half, shares[::-1].copy())])
    index = np.arange(num_samples)
    source, rank = order.pick(index)
    for owner in np.unique(source):
        here = source == owner
        assert np.array_equal(rank[here], np.arange(here.sum()))
        assert np.array_equal(order.index_of(int(owner), rank[here]), index[here])


@given(many_weights, st.integers(1, 5000))
@settings(max_examples=60)
def test_phase_total_is_the_largest_remainder_rounding(weights, num_samples) -> None:
    shares = normalised(weights)
    totals = MixtureOrder([Segment(num_samples, shares)]).totals
    exact = shares * num_samples
    assert totals.sum() == num_samples
    assert np.all(np.abs(totals - exact) < 1 + 1e-9)
    up, down = totals > np.floor(exact), totals == np.floor(exact)
    if up.any() and down.any():
        remainder = exact - np.floor(exact)
        assert remainder[up].min() >= remainder[down].max() - 1e-9


def test_largest_remainder_respects_its_bounds() -> None:
    counts = largest_remainder(
        np.array([2.9, 0.6, 0.5]), 4, low=np.array([0, 1, 0]), high=np.array([2, 9, 9])
    )
    assert counts.tolist() == [2, 1, 1]


def test_largest_segment_does_not_overflow() -> None:
    tree = QuotaTree(np.array([MAX_SEGMENT_SAMPLES - 3, 1, 2]))
    index = np.arange(MAX_SEGMENT_SAMPLES - 1000, MAX_SEGMENT_SAMPLES)
    source, rank = tree.pick(index)
    assert np.array_equal(tree.index_of(0, rank[source == 0]), index[source == 0])
    assert tree.counts(MAX_SEGMENT_SAMPLES).tolist() == [MAX_SEGMENT_SAMPLES - 3, 1, 2]


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 5000), st.floats(0, 1))
@settings(max_examples=60)
def test_ramp_is_a_staircase_with_the_ramps_own_integral(shape, num_samples, last_share) -> None:
    first, last = np.array([1.0, 0.0]), np.array([1 - last_share, last_share])
    ramp = Ramp(0, num_samples * 8, first, last, shape)
    segments = mixture_segments(
        Curve((ramp,)), start_tokens=0, seq_length=8, num_samples=num_samples
    )
    assert sum(segment.num_samples for segment in segments) == num_samples
    area = sum(segment.num_samples * segment.weights[1] for segment in segments)
    assert abs(area - num_samples * last_share / 2) < 1e-6 * num_samples


def test_stretch_that_begins_inside_a_ramp_cuts_the_same_staircase() -> None:
    ramp = Ramp(0, 6400, np.array([1.0, 0.0]), np.array([0.0, 1.0]), "linear")
    whole = mixture_segments(Curve((ramp,)), start_tokens=0, seq_length=8, num_samples=800)
    rest = mixture_segments(Curve((ramp,)), start_tokens=3200, seq_length=8, num_samples=400)
    per_sample = np.concatenate([np.full(s.num_samples, s.weights[1]) for s in whole])
    rest_per_sample = np.concatenate([np.full(s.num_samples, s.weights[1]) for s in rest])
    assert np.array_equal(per_sample[400:], rest_per_sample)
