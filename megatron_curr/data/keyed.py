"""Randomness without state: hashes and shuffles keyed by what they are for, and by a counter.

Every draw is a function of (seed, purpose, counters): the same on every rank and layout, different
for every sample and every visit, and there is nothing to save or to restore.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Ints = NDArray[np.int64]

GOLDEN = 0x9E3779B97F4A7C15  # 2**64 over the golden ratio, odd
WORD = 2**64
FEISTEL_ROUNDS = 6


def stream_key(seed: int, purpose: str) -> int:
    """A 64-bit key for one purpose, such as the shuffle of one source."""
    digest = hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(words: Words) -> Words:
    """Scramble 64-bit words, one to one.

    The finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", OOPSLA 2014), with Stafford's constants.
    """
    words = words ^ (words >> np.uint64(30))
    words = words * np.uint64(0xBF58476D1CE4E5B9)
    words = words ^ (words >> np.uint64(27))
    words = words * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def derive(key: Words, counter: Ints) -> Words:
    """One key a counter value, elementwise."""
    return mix(key + counter.astype(np.uint64) * np.uint64(GOLDEN))


def identity_keys(names: Sequence[str]) -> Words:
    """[n]: what ``identities`` begins with for what goes by these names; no run's own."""
    return np.array([stream_key(0, f"identity/{name}") for name in names], np.uint64)


def identities(keys: Words, *counters: Ints) -> Words:
    """[n]: 64 bits a sample that say which one it is; arrays are [n]."""
    for counter in counters:
        keys = derive(keys, counter)
    return keys


def digest_of(total: int) -> str:
    """What is told of some samples, from the sum of their identities: in any order and parts."""
    return f"{total % WORD:016x}"


def below(words: Words, bound: Ints) -> Ints:
    """Map scrambled words evenly onto 0 to ``bound`` - 1; bounds are below 2**32."""
    high = (words >> np.uint64(32)) * bound.astype(np.uint64)
    return (high >> np.uint64(32)).astype(np.int64)


def uniforms(seed: int, purpose: str, positions: Ints, num_draws: int) -> NDArray[np.float64]:
    """[num_positions, num_draws] numbers in [0, 1), keyed by (seed, purpose, position, draw)."""
    key = np.full(len(positions), stream_key(seed, purpose), np.uint64)
    rows = derive(key, positions)[:, None]
    words = derive(rows, np.arange(1, num_draws + 1)[None, :])
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffle(index: Ints, size: Ints, key: Words) -> Ints:
    """Where each index goes in a keyed permutation of ``size`` items; all arrays of one length.

    A Feistel network over pairs (left, right) with left * right just above ``size``, walked again
    where it leaves the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    return _walk(index, size, key, range(FEISTEL_ROUNDS))


def unshuffle(index: Ints, size: Ints, key: Words) -> Ints:
    """The inverse of ``shuffle``."""
    return _walk(index, size, key, range(FEISTEL_ROUNDS - 1, -1, -1))


def _walk(index: Ints, size: Ints, key: Words, rounds: range) -> Ints:
    num_left = np.ceil(np.sqrt(size.astype(np.float64))).astype(np.int64)
    num_right = -(-size // num_left)
    result = _network(index, num_left, num_right, key, rounds)
    outside = np.flatnonzero(result >= size)
    while len(outside):
        again = _network(
            result[outside], num_left[outside], num_right[outside], key[outside], rounds
        )
        result[outside] = again
        outside = outside[again >= size[outside]]
    return result


def _network(index: Ints, num_left: Ints, num_right: Ints, key: Words, rounds: range) -> Ints:
    left = index // num_right
    right = index - left * num_right
    forward = rounds.step > 0
    for number in rounds:
        round_key = key + np.uint64((number + 1) * GOLDEN % WORD)
        if number % 2:
            left = _turn(left, num_left, mix(round_key ^ right.astype(np.uint64)), forward)
        else:
            right = _turn(right, num_right, mix(round_key ^ left.astype(np.uint64)), forward)
    return left * num_right + right


def _turn(part: Ints, size: Ints, words: Words, forward: bool) -> Ints:
    """Rotate one half by a keyed amount, or back."""
    shift = below(words, size)
    turned = part + shift if forward else part - shift
    if forward:
        return np.where(turned >= size, turned - size, turned)
    return np.where(turned < 0, turned + size, turned)
