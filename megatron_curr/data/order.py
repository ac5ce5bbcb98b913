"""The order of samples: position <-> (source, epoch, window), computed and never stored.

Which source owns a position is the mixture's affair (``curriculum.mixture``); here a source's j-th
sample becomes a window of its token stream.

A source's stream is cut into chunks as long as the longest sequence it will be read at. Every epoch
shuffles the chunks with its own key, and reads them in groups of at most one in
``CHUNKS_PER_GROUP``: the windows of a group are shuffled among each other. Where the sequence
length changes, reading goes on with the next group, so what an epoch has read is always a set of
whole chunks but for one group: no token comes twice in an epoch, and at most one group a change is
skipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_curr.curriculum.mixture import MixtureOrder, mixture_segments, without
from megatron_curr.curriculum.schedule import Schedule, Stretch
from megatron_curr.data.keyed import (
    Words,
    below,
    derive,
    identities,
    identity_keys,
    mix,
    shuffle,
    stream_key,
    unshuffle,
)
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.schema import Source

Ints = NDArray[np.int64]

# A group is at most this part of a source: what a change of sequence length may skip.
CHUNKS_PER_GROUP = 2000


@dataclass(frozen=True, slots=True)
class Samples:
    """One row a sample, all arrays [num_samples]."""

    position: Ints
    source: Ints  # index into SampleOrder.sources
    epoch: Ints
    first_token: Ints  # in the source's stream; the sample reads seq_length + 1 tokens
    seq_length: Ints


@dataclass(frozen=True, slots=True)
class Reading:
    """A run of positions with one mixture and one sequence length."""

    start_position: int
    num_samples: int
    seq_length: int
    mixture: MixtureOrder
    first_window: Ints  # [num_sources] windows of this length behind each source's cursor

    @property
    def end_position(self) -> int:
        """The first position after it."""
        return self.start_position + self.num_samples


class SampleOrder:
    """The samples of a run, both ways. Reads no data: it needs only the sources' sizes.

    ``schedule`` is the given one, or a shorter one where a source with ``on_exhausted: stop`` runs
    out. Raises ``RecipeError`` where a source is unknown, too small for one window, or would pass
    its ``max_epochs`` under ``on_exhausted: error``.
    """

    def __init__(
        self,
        schedule: Schedule,
        source_tokens: Mapping[str, int],
        *,
        seed: int,
        sources: Mapping[str, Source],
        chunk_tokens: int | None = None,
    ) -> None:
        self.sources = schedule.sources
        self.schedule = schedule
        self._settings = [_setting(sources, name) for name in self.sources]
        self.num_tokens = np.array([source_tokens[name] for name in self.sources], np.int64)
        self.chunk = _chunk_lengths(schedule, chunk_tokens)
        # The last window needs one token more, for its last label.
        self.num_chunks = (self.num_tokens - 1) // self.chunk
        self.slack = self.num_tokens - 1 - self.num_chunks * self.chunk
        self.group = np.maximum(self.num_chunks // CHUNKS_PER_GROUP, 1)
        self.key = np.array([stream_key(seed, f"order/{name}") for name in self.sources], np.uint64)
        self._identity_key = identity_keys(self.sources)
        self._check_sizes()
        self.crumbs = np.zeros(len(self.sources), np.int64)  # tokens skipped at changes of length
        self.readings = self._lay_readings()
        self._starts = np.array([reading.start_position for reading in self.readings])

    @property
    def num_groups(self) -> int:
        """Losses are told apart by source."""
        return len(self.sources)

    # -- position -> sample

    def lookup(self, positions: Ints) -> Samples:
        """The samples at these positions, in the same order."""
        source, window, length = (np.empty_like(positions) for _ in range(3))
        reading_of = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(reading_of):
            reading, here = self.readings[number], reading_of == number
            picked, rank = reading.mixture.pick(positions[here] - reading.start_position)
            source[here], window[here] = picked, reading.first_window[picked] + rank
            length[here] = reading.seq_length
        per_chunk = self.chunk[source] // length
        epoch, in_epoch = np.divmod(window, self.num_chunks[source] * per_chunk)
        chunk, part = self._place(source, epoch, in_epoch, per_chunk)
        first_token = self._offset(source, epoch) + chunk * self.chunk[source] + part * length
        return Samples(positions, source, epoch, first_token, length)

    def identities(self, samples: Samples) -> Words:
        """[num_samples]: which tokens each sample reads, and at which position of the run."""
        keys = self._identity_key[samples.source]
        return identities(keys, samples.position, samples.first_token, samples.seq_length)

    def _place(self, source: Ints, epoch: Ints, window: Ints, per_chunk: Ints) -> tuple[Ints, Ints]:
        """(chunk, part of it) of the ``window``-th read of an epoch."""
        key = derive(self.key[source], epoch)
        group, inside = np.divmod(window, self.group[source] * per_chunk)
        first = group * self.group[source]
        size = np.minimum(self.num_chunks[source] - first, self.group[source]) * per_chunk
        slot, part = np.divmod(shuffle(inside, size, derive(key, group + 1)), per_chunk)
        return shuffle(first + slot, self.num_chunks[source], mix(key)), part

    def _offset(self, source: Ints, epoch: Ints) -> Ints:
        """Where an epoch's first chunk starts: the ends left over vary from epoch to epoch."""
        return below(derive(~self.key[source], epoch), self.slack[source] + 1)

    # -- tokens -> positions

    def positions_of(self, source: str, first_token: int, num_tokens: int) -> Ints:
        """Every position of the run whose sample reads one of these tokens, ascending."""
        index = self.sources.index(source)
        found = [
            self._positions_in(reading, index, epoch, first_token, num_tokens)
            for reading in self.readings
            for epoch in self._epochs_in(reading, index)
        ]
        return np.sort(np.concatenate([np.zeros(0, np.int64), *found]))

    def _epochs_in(self, reading: Reading, source: int) -> range:
        count = int(self._counts_in(reading)[source])
        if not count:
            return range(0)
        per_epoch = int(self.num_chunks[source] * (self.chunk[source] // reading.seq_length))
        first = int(reading.first_window[source])
        return range(first // per_epoch, (first + count - 1) // per_epoch + 1)

    def _positions_in(
        self, reading: Reading, source: int, epoch: int, first_token: int, num_tokens: int
    ) -> Ints:
        length, chunk = reading.seq_length, int(self.chunk[source])
        per_chunk, num_chunks = chunk // length, int(self.num_chunks[source])
        offset = int(self._offset(np.array([source]), np.array([epoch]))[0])
        # A sample reads seq_length + 1 tokens from its start.
        low = max(-((offset + length - first_token) // length), 0)
        high = min((first_token + num_tokens - 1 - offset) // length, num_chunks * per_chunk - 1)
        windows = np.arange(low, max(high + 1, low), dtype=np.int64)
        full = np.full_like(windows, 1)
        key = derive(self.key[source] * full.astype(np.uint64), epoch * full)
        where, part = np.divmod(windows, per_chunk)
        rank = unshuffle(where, num_chunks * full, mix(key))
        group, slot = np.divmod(rank, self.group[source])
        first = group * self.group[source]
        size = np.minimum(num_chunks - first, self.group[source]) * per_chunk
        inside = unshuffle(slot * per_chunk + part, size, derive(key, group + 1))
        in_epoch = first * per_chunk + inside
        nth = in_epoch + epoch * num_chunks * per_chunk - int(reading.first_window[source])
        nth = nth[(nth >= 0) & (nth < self._counts_in(reading)[source])]
        return reading.start_position + reading.mixture.index_of(source, nth)

    # -- how much of each source

    def counts(self, position: int) -> Ints:
        """[num_sources]: samples of each source before this position."""
        total = np.zeros(len(self.sources), np.int64)
        for reading in self.readings:
            if reading.start_position < position:
                total += reading.mixture.counts(
                    min(position - reading.start_position, reading.num_samples)
                )
        return total

    def consumed_tokens(self, position: int) -> dict[str, int]:
        """Tokens of each source consumed before this position."""
        total = np.zeros(len(self.sources), np.int64)
        for reading in self.readings:
            if reading.start_position < position:
                count = min(position - reading.start_position, reading.num_samples)
                total += reading.mixture.counts(count) * reading.seq_length
        return dict(zip(self.sources, total.tolist(), strict=True))

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over each source before this position, in consumed tokens over its size."""
        consumed = self.consumed_tokens(position)
        sizes = dict(zip(self.sources, self.num_tokens.tolist(), strict=True))
        return {name: tokens / sizes[name] for name, tokens in consumed.items()}

    def _counts_in(self, reading: Reading) -> Ints:
        return reading.mixture.counts(reading.num_samples)

    # -- building

    def _check_sizes(self) -> None:
        for name, tokens, chunk in zip(self.sources, self.num_tokens, self.chunk, strict=True):
            if tokens <= chunk:
                raise RecipeError(
                    f"data.sources.{name} holds {tokens} tokens, fewer than one window of {chunk} "
                    f"and its label; add shards, or give it weight only in phases with a shorter "
                    f"seq_length"
                )

    def _lay_readings(self) -> list[Reading]:
        readings: list[Reading] = []
        cursor = _Cursor(self)
        for stretch in self.schedule.stretches:
            segments = mixture_segments(
                stretch.curves.mixture,
                start_tokens=stretch.start_tokens,
                seq_length=stretch.seq_length,
                num_samples=stretch.planned_samples,
            )
            start, left = stretch.start_position, stretch.num_samples
            while left:
                first_window = cursor.at(stretch.seq_length)
                mixture = MixtureOrder(segments)
                reading = Reading(start, left, stretch.seq_length, mixture, first_window)
                reading, exhausted = self._until_exhausted(reading, stretch)
                if reading.num_samples:
                    readings.append(reading)
                    cursor.advance(reading, self._counts_in(reading))
                start, left = start + reading.num_samples, left - reading.num_samples
                if exhausted is None:
                    continue
                if self._settings[exhausted].on_exhausted == "stop":
                    end = self.schedule.step_start(self.schedule.consumed_at(start))
                    if end == 0:
                        raise RecipeError(self._exhausted_message(exhausted, stretch))
                    self.schedule = self.schedule.ended_at(end)
                    return _ended(readings, self.schedule.total_samples)
                segments = without(segments, reading.num_samples, exhausted)
                if not segments:
                    raise RecipeError(self._exhausted_message(exhausted, stretch))
        return readings

    def _until_exhausted(self, reading: Reading, stretch: Stretch) -> tuple[Reading, int | None]:
        """The reading cut where its first source passes ``max_epochs``, and that source."""
        per_epoch = self.num_chunks * (self.chunk // reading.seq_length)
        most = np.array([setting.max_epochs for setting in self._settings])
        left = np.floor(most * per_epoch).astype(np.int64) - reading.first_window
        over = np.flatnonzero(self._counts_in(reading) > np.maximum(left, 0))
        ends = {}
        for source in over.tolist():
            if self._settings[source].on_exhausted == "error":
                raise RecipeError(self._exhausted_message(source, stretch))
            nth = np.array([max(int(left[source]), 0)])
            ends[int(reading.mixture.index_of(source, nth)[0])] = source
        if not ends:
            return reading, None
        end = min(ends)
        return replace(reading, num_samples=end), ends[end]

    def _exhausted_message(self, source: int, stretch: Stretch) -> str:
        name, setting = self.sources[source], self._settings[source]
        return (
            f"data.sources.{name} would be read more than max_epochs={setting.max_epochs:g} times "
            f"by the end of phase {stretch.phase!r}: it holds {self.num_tokens[source]:,} tokens. "
            f"Lower its weight, add shards, raise max_epochs, or set on_exhausted to stop or "
            f"reweight"
        )


class _Cursor:
    """How far each source has been read, while readings are laid out."""

    def __init__(self, order: SampleOrder) -> None:
        self.order = order
        self.length = order.chunk.copy()
        self.window = np.zeros(len(order.sources), np.int64)

    def at(self, seq_length: int) -> Ints:
        """[num_sources]: windows of this length that lie behind the cursor.

        Where the length differs from the last one, the rest of a begun group is skipped.
        """
        order = self.order
        old = order.chunk // self.length
        epoch, inside = np.divmod(self.window, order.num_chunks * old)
        chunks = -(-inside // (order.group * old)) * order.group
        chunks = np.minimum(chunks, order.num_chunks) + epoch * order.num_chunks
        new = np.maximum(order.chunk // seq_length, 1)
        return np.where(self.length == seq_length, self.window, chunks * new)

    def advance(self, reading: Reading, counts: Ints) -> None:
        """Move past what a reading has read."""
        order = self.order
        used = counts > 0
        changed = used & (self.length != reading.seq_length)
        behind = reading.first_window * reading.seq_length - self.window * self.length
        order.crumbs += np.where(changed, behind, 0)
        self.window = np.where(used, reading.first_window + counts, self.window)
        self.length = np.where(used, reading.seq_length, self.length)


def _setting(sources: Mapping[str, Source], name: str) -> Source:
    if name not in sources:
        raise RecipeError(
            f"the mixture names {name!r}, which data.sources does not have; "
            f"known sources: {', '.join(sorted(sources))}"
        )
    return sources[name]


def _chunk_lengths(schedule: Schedule, chunk_tokens: int | None) -> Ints:
    """[num_sources]: the longest sequence that the edition which brings a source reads it at.

    Later editions must fit into it: a longer window cannot be cut from an epoch already shuffled.
    """
    chunk = np.zeros(len(schedule.sources), np.int64)
    brought_by = np.full(len(schedule.sources), -1)
    for stretch in schedule.planned:
        used = _sources_in(stretch)
        brought_by[used & (brought_by < 0)] = stretch.edition
        fresh = used & (brought_by == stretch.edition)
        chunk[fresh] = np.maximum(chunk[fresh], max(stretch.seq_length, chunk_tokens or 0))
    for stretch in schedule.planned:
        length = stretch.seq_length
        misfits = np.flatnonzero(_sources_in(stretch) & ((chunk % length > 0) | (chunk < length)))
        if len(misfits):
            raise RecipeError(
                f"curriculum.phases[{stretch.phase}].seq_length={length} does not divide the chunk "
                f"of {chunk[misfits[0]]} tokens in which {schedule.sources[misfits[0]]!r} is "
                f"shuffled; set data.chunk_tokens to a multiple of every seq_length when the run "
                f"starts"
            )
    return np.maximum(chunk, 1)


def _sources_in(stretch: Stretch) -> NDArray[np.bool_]:
    """[num_sources]: which sources have weight anywhere in this stretch's phase."""
    used = np.zeros(len(stretch.curves.mixture.last), np.bool_)
    for ramp in stretch.curves.mixture.ramps:
        used |= (ramp.first > 0) | (ramp.last > 0)
    return used


def _ended(readings: list[Reading], end_position: int) -> list[Reading]:
    return [
        replace(
            reading, num_samples=min(reading.num_samples, end_position - reading.start_position)
        )
        for reading in readings
        if reading.start_position < end_position
    ]
