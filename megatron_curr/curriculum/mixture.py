"""Which source owns each sample of a phase: exact quotas, computed and never stored.

A phase is cut into segments of constant weights (one when the mixture does not ramp, up to
``RAMP_PLATEAUS`` for a ramp). Largest-remainder rounding gives every source a whole number of
samples in every segment. Inside a segment a binary tree over the sources deals them out: a node
that has received ``m`` samples has passed ``round(m * left / (left + right))`` of them to its left
child. Both directions are closed forms in integers, so sample -> (source, rank) and back need no
state.

How even it is. One split errs by at most half a sample, and passes on to a leaf its parent's error
times the leaf's share, so a source is off by at most half the sum of its shares along its path. The
tree joins the lightest two nodes first (Huffman's order); node weights along a path then grow at
least like Fibonacci numbers, and the sum stays below 3.36: less than 1.7 samples, for any number of
sources.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_curr.curriculum.curves import Curve, Floats, mean_progress

Ints = NDArray[np.int64]

RAMP_PLATEAUS = 64
# The splits multiply a count by a quota and by two in 64 bits.
MAX_SEGMENT_SAMPLES = 2**30
# Built trees kept in memory; a run reads one segment at a time.
TREES_KEPT = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of samples over which the weights do not move."""

    num_samples: int
    weights: Floats  # [num_sources], sums to 1


def mixture_segments(
    curve: Curve[Floats], *, start_tokens: int, seq_length: int, num_samples: int
) -> list[Segment]:
    """Cut a stretch of ``num_samples`` into segments of constant weights.

    A ramp becomes a staircase of ``RAMP_PLATEAUS`` equal steps whose weights are the ramp's mean
    over each, so both have the same integral at every edge. The steps are laid out from the ramp's
    own start: a stretch that begins inside it cuts the same staircase.
    """
    bounds = [round((ramp.start_tokens - start_tokens) / seq_length) for ramp in curve.ramps]
    segments: list[Segment] = []
    _append(segments, 0, min(bounds[0], num_samples), curve.ramps[0].first)
    for ramp, first, limit in zip(curve.ramps, bounds, [*bounds[1:], num_samples], strict=True):
        last = min(round((ramp.end_tokens - start_tokens) / seq_length), limit)
        if not ramp.constant and ramp.shape != "step" and last > first:
            plateaus = min(RAMP_PLATEAUS, last - first)
            edges = [first + (last - first) * i // plateaus for i in range(plateaus + 1)]
            for low, high in pairwise(edges):
                span = last - first
                mean = mean_progress(ramp.shape, (low - first) / span, (high - first) / span)
                weights = ramp.first + (ramp.last - ramp.first) * mean
                _append(segments, max(low, 0), min(high, num_samples), weights)
        else:
            _append(segments, max(first, 0), min(last, num_samples), ramp.first)
        _append(segments, max(last, 0), min(limit, num_samples), ramp.last)
    return segments


def split_segment(num_samples: int, weights: Floats) -> list[Segment]:
    """Samples of one set of weights, in segments no longer than may be; none for none."""
    sizes = [MAX_SEGMENT_SAMPLES] * (num_samples // MAX_SEGMENT_SAMPLES)
    if rest := num_samples % MAX_SEGMENT_SAMPLES:
        sizes.append(rest)
    return [Segment(size, weights) for size in sizes]


def without(segments: list[Segment], done: int, source: int) -> list[Segment]:
    """The segments after the first ``done`` samples, without one source; empty if none is left."""
    rest = []
    for segment in segments:
        skipped = min(done, segment.num_samples)
        done -= skipped
        weights = segment.weights.copy()
        weights[source] = 0.0
        total = math.fsum(weights)
        if skipped == segment.num_samples:
            continue
        if total <= 0:
            return []
        rest.append(Segment(segment.num_samples - skipped, weights / total))
    return rest


def _append(segments: list[Segment], first: int, limit: int, weights: Floats) -> None:
    segments += split_segment(max(limit - first, 0), weights)


def largest_remainder(targets: Floats, total: int, *, low: Ints, high: Ints) -> Ints:
    """Whole numbers that sum to ``total``, nearest to ``targets`` and between ``low`` and ``high``.

    Hamilton's method: round down, then one more to the largest remainders; ties go to the first.
    """
    counts = np.clip(np.floor(targets).astype(np.int64), low, high)
    while missing := total - int(counts.sum()):
        step = 1 if missing > 0 else -1
        open_to_it = np.flatnonzero(counts < high if step > 0 else counts > low)
        wish = -step * (targets[open_to_it] - counts[open_to_it])
        chosen = open_to_it[np.argsort(wish, kind="stable")[: abs(missing)]]
        counts[chosen] += step
    return counts


class QuotaTree:
    """Deals ``sum(quotas)`` samples to sources so that every prefix is proportional.

    ``quotas`` [num_sources] are whole, 0 or more, and sum to at most ``MAX_SEGMENT_SAMPLES``.
    """

    def __init__(self, quotas: Ints) -> None:
        self.num_sources = len(quotas)
        owners = np.flatnonzero(quotas)
        num_leaves = len(owners)
        num_nodes = max(2 * num_leaves - 1, 1)
        self.owner = np.full(num_nodes, -1, np.int64)  # source of a leaf
        self.owner[:num_leaves] = owners
        self.leaf = np.full(self.num_sources, -1, np.int64)
        self.leaf[owners] = np.arange(num_leaves)
        self.weight = np.zeros(num_nodes, np.int64)
        self.weight[:num_leaves] = quotas[owners]
        self.left = np.full(num_nodes, -1, np.int64)
        self.right = np.full(num_nodes, -1, np.int64)
        self.parent = np.full(num_nodes, -1, np.int64)
        self._join_lightest_first(num_leaves)
        self.root = num_nodes - 1

    def _join_lightest_first(self, num_leaves: int) -> None:
        heap = [(int(weight), node) for node, weight in enumerate(self.weight[:num_leaves])]
        heapq.heapify(heap)
        for node in range(num_leaves, 2 * num_leaves - 1):
            light_weight, light = heapq.heappop(heap)
            heavy_weight, heavy = heap[0]
            self.left[node], self.right[node] = light, heavy
            self.parent[light] = self.parent[heavy] = node
            self.weight[node] = light_weight + heavy_weight
            heapq.heapreplace(heap, (light_weight + heavy_weight, node))

    def pick(self, index: Ints) -> tuple[Ints, Ints]:
        """(source, rank): who owns each sample, and how many that source had before it."""
        node = np.full(len(index), self.root, np.int64)
        rank = index.astype(np.int64)
        inner = np.flatnonzero(self.left[node] >= 0)
        while len(inner):
            at, seen = node[inner], rank[inner]
            left_node, twice_whole = self.left[at], 2 * self.weight[at]
            twice_left = 2 * self.weight[left_node]
            # A left child has round(seen * left / whole) of the samples seen so far.
            numerator = seen * twice_left + (twice_whole >> 1)
            left_seen = numerator // twice_whole
            goes_left = numerator - left_seen * twice_whole + twice_left >= twice_whole
            node[inner] = np.where(goes_left, left_node, self.right[at])
            rank[inner] = np.where(goes_left, left_seen, seen - left_seen)
            inner = inner[self.left[node[inner]] >= 0]
        return self.owner[node], rank

    def index_of(self, source: int, rank: Ints) -> Ints:
        """The inverse of ``pick`` for one source: where its ``rank``-th sample stands."""
        node, index = int(self.leaf[source]), rank.astype(np.int64)
        while (parent := int(self.parent[node])) >= 0:
            own, whole = 2 * self.weight[node], self.weight[parent]
            reach = (2 * index + 1) * whole
            index = -(-reach // own) - 1 if node == self.left[parent] else reach // own
            node = parent
        return index

    def counts(self, index: int) -> Ints:
        """[num_sources]: samples that each source owns among the first ``index``."""
        seen = np.zeros(len(self.weight), np.int64)
        seen[self.root] = index
        level = np.array([self.root])
        while len(level := level[self.left[level] >= 0]):
            left, right, whole = self.left[level], self.right[level], self.weight[level]
            seen[left] = (2 * seen[level] * self.weight[left] + whole) // (2 * whole)
            seen[right] = seen[level] - seen[left]
            level = np.concatenate([left, right])
        result = np.zeros(self.num_sources, np.int64)
        leaves = np.flatnonzero(self.owner >= 0)
        result[self.owner[leaves]] = seen[leaves]
        return result


class MixtureOrder:
    """Sample <-> (source, rank within the stretch), for segments laid end to end.

    Ranks count a source's samples from the start of the stretch. ``totals`` [num_sources] is the
    largest-remainder rounding of the weights' integral.
    """

    def __init__(self, segments: list[Segment]) -> None:
        self.segments = segments
        self.num_samples = sum(segment.num_samples for segment in segments)
        self.starts = np.cumsum([0, *(segment.num_samples for segment in segments)])
        targets = np.cumsum([s.weights * s.num_samples for s in segments], axis=0)
        nothing = np.zeros(targets.shape[1], np.int64)
        everything = np.where(targets[-1] > 0, self.num_samples, 0)
        totals = largest_remainder(targets[-1], self.num_samples, low=nothing, high=everything)
        edges = [nothing]
        for target, edge in zip(targets[:-1], self.starts[1:-1], strict=True):
            edges.append(largest_remainder(target, int(edge), low=edges[-1], high=totals))
        self.edges: Ints = np.stack([*edges, totals])  # [num_segments + 1, num_sources] cumulative
        self.tree: Callable[[int], QuotaTree] = lru_cache(maxsize=TREES_KEPT)(self._build_tree)

    @property
    def totals(self) -> Ints:
        """[num_sources]: samples that each source owns in the whole stretch."""
        totals: Ints = self.edges[-1]
        return totals

    def pick(self, index: Ints) -> tuple[Ints, Ints]:
        """(source, rank within the stretch) of each sample."""
        source, rank = np.empty_like(index), np.empty_like(index)
        segment_of = np.searchsorted(self.starts, index, side="right") - 1
        for segment in np.unique(segment_of):
            here = segment_of == segment
            picked, local_rank = self.tree(int(segment)).pick(index[here] - self.starts[segment])
            source[here], rank[here] = picked, self.edges[segment][picked] + local_rank
        return source, rank

    def index_of(self, source: int, rank: Ints) -> Ints:
        """The inverse of ``pick`` for one source; ranks below ``totals[source]``."""
        index = np.empty_like(rank)
        segment_of = np.searchsorted(self.edges[:, source], rank, side="right") - 1
        for segment in np.unique(segment_of):
            here = segment_of == segment
            local = rank[here] - self.edges[segment, source]
            tree = self.tree(int(segment))
            index[here] = self.starts[segment] + tree.index_of(source, local)
        return index

    def counts(self, index: int) -> Ints:
        """[num_sources]: samples that each source owns among the first ``index``."""
        segment = int(np.searchsorted(self.starts, index, side="right")) - 1
        if segment == len(self.starts) - 1:
            return self.totals
        counts = self.tree(segment).counts(index - int(self.starts[segment]))
        counts += self.edges[segment]
        return counts

    def _build_tree(self, segment: int) -> QuotaTree:
        return QuotaTree(self.edges[segment + 1] - self.edges[segment])
