"""Keyed randomness: permutations that are permutations, draws that depend on nothing else."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_curr.data.keyed import below, derive, shuffle, stream_key, uniforms, unshuffle


@given(st.integers(1, 5000), st.integers(0, 2**63))
@settings(max_examples=100)
def test_shuffle_is_a_permutation_and_unshuffle_its_inverse(size, key) -> None:
    index = np.arange(size)
    sizes, keys = np.full(size, size), np.full(size, key, np.uint64)
    moved = shuffle(index, sizes, keys)
    assert np.array_equal(np.sort(moved), index)
    assert np.array_equal(unshuffle(moved, sizes, keys), index)


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**63)), min_size=1, max_size=50))
@settings(max_examples=50)
def test_elements_of_one_call_do_not_see_each_other(items) -> None:
    sizes = np.array([size for size, _ in items])
    keys = np.array([key for _, key in items], np.uint64)
    index = sizes // 2
    together = shuffle(index, sizes, keys)
    ones = [slice(i, i + 1) for i in range(len(items))]
    alone = [int(shuffle(index[one], sizes[one], keys[one])[0]) for one in ones]
    assert together.tolist() == alone
    assert np.array_equal(unshuffle(together, sizes, keys), index)


def test_epochs_have_unrelated_orders() -> None:
    size = 10_000
    index, sizes = np.arange(size), np.full(size, size)
    key = np.full(size, stream_key(1, "order/prose"), np.uint64)
    first = shuffle(index, sizes, derive(key, np.zeros(size, np.int64)))
    second = shuffle(index, sizes, derive(key, np.ones(size, np.int64)))
    assert (first == second).mean() < 0.002
    for moved in (first, second):
        assert abs(np.corrcoef(index, moved)[0, 1]) < 0.05
        # Neighbours do not stay neighbours.
        assert (np.abs(np.diff(moved)) == 1).mean() < 0.002


def test_every_place_is_equally_likely() -> None:
    size, keys = 16, 20_000
    index = np.tile(np.arange(size), keys)
    key = derive(np.full(size * keys, 7, np.uint64), np.repeat(np.arange(keys), size))
    moved = shuffle(index, np.full(size * keys, size), key)
    table = np.zeros((size, size))
    np.add.at(table, (index, moved), 1)
    expected = keys / size
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert chi_square < 225 + 5 * np.sqrt(2 * 225)  # (16 - 1)**2 degrees of freedom, five sigma


def test_uniforms_depend_on_seed_purpose_and_position_alone() -> None:
    positions = np.arange(1000)
    draws = uniforms(1, "noise", positions, 3)
    assert draws.shape == (1000, 3) and draws.min() >= 0 and draws.max() < 1
    assert np.array_equal(uniforms(1, "noise", positions[500:], 3), draws[500:])
    assert np.array_equal(uniforms(1, "noise", positions, 1), draws[:, :1])
    for other in (uniforms(2, "noise", positions, 3), uniforms(1, "timestep", positions, 3)):
        assert not np.any(other == draws)
    assert abs(draws.mean() - 0.5) < 0.03 and abs(np.corrcoef(draws.T)[0, 1]) < 0.1


def test_below_covers_its_range_evenly() -> None:
    words = derive(np.full(60_000, 3, np.uint64), np.arange(60_000))
    counts = np.bincount(below(words, np.full(60_000, 6)), minlength=6)
    assert len(counts) == 6 and counts.min() > 9_500


def test_stream_keys_differ_by_seed_and_purpose() -> None:
    assert len({stream_key(seed, name) for seed in range(50) for name in ("a", "b")}) == 100
