"""Which documents a sample is made of, and when a document is read: no model, no torch.

A recipe is traced as it stands; a run by its own ``recipe.yaml`` and ``ledger.jsonl``, amendments
included. Video runs are made of lots of clips (``video_trace.py``).
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np

from megatron_curr.curriculum.ledger import Entry, ledger_schedule, open_ledger, read_ledger
from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.data.identity import (
    AnyShards,
    KnownData,
    check_unchanged,
    files_of,
    load_tokenizer_of,
    read_known,
)
from megatron_curr.data.keyed import Words
from megatron_curr.data.order import SampleOrder, Samples
from megatron_curr.data.shards import ShardSet, Span, open_shards
from megatron_curr.data.tokenizer import Tokenizer
from megatron_curr.data.video_data import open_video_data
from megatron_curr.errors import DataError, RecipeError
from megatron_curr.recipe.check import check_recipe
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.video_trace import VideoTrace, row_as_json, row_as_text

_AT_ONCE = 4_096  # samples looked up together, so that a long trace starts printing at once


@dataclass(frozen=True, slots=True)
class TracedSample:
    """One sample of the run. ``spans`` cover its ``seq_length`` input tokens in reading order."""

    position: int
    consumed_tokens: int  # before this sample
    phase: str
    source: str
    epoch: int
    seq_length: int
    first_token: int  # in the source's token stream
    spans: tuple[Span, ...]


class Trace:
    """The order of a run and the shards it reads."""

    def __init__(self, recipe: Recipe, order: SampleOrder, shard_sets: dict[str, ShardSet]) -> None:
        self.recipe = recipe
        self.order = order
        self.schedule = order.schedule
        self.shard_sets = shard_sets
        self._phase_starts = [stretch.start_position for stretch in self.schedule.stretches]
        # A shard goes by its own name, and by SOURCE/NAME where two sources use the name.
        keys = [(source, label) for source, known in shard_sets.items() for label in known.labels]
        times = Counter(label for _, label in keys)
        self._names = {
            (source, label): label if times[label] == 1 else f"{source}/{label}"
            for source, label in keys
        }
        self._shards = {name: key for key, name in self._names.items()}

    def samples(self, positions: np.ndarray) -> Iterator[TracedSample]:
        """The samples at these positions. Raises ``DataError`` for one outside the run."""
        total = self.schedule.total_samples
        for start in range(0, len(positions), _AT_ONCE):
            some = np.asarray(positions[start : start + _AT_ONCE], np.int64)
            if len(some) and (some.min() < 0 or some.max() >= total):
                raise DataError(f"position {some.max()}: the run has positions 0 to {total - 1:,}")
            found = self.order.lookup(some)
            yield from (self._traced(found, number) for number in range(len(some)))

    def identities(self, plan: StepPlan) -> Words:
        """[num_samples]: what a step reads, as its row in the metrics counts it."""
        positions = np.arange(plan.position, plan.position + plan.num_samples)
        return self.order.identities(self.order.lookup(positions))

    def positions_of(self, document: str) -> np.ndarray:
        """Every position whose input holds a token of ``SHARD:I``, ascending."""
        source, first_token, num_tokens = self.find_document(document)
        if num_tokens == 0:
            return np.empty(0, np.int64)
        found = self.order.positions_of(source, first_token, num_tokens)
        # A sample's last token is only a label; a document met there alone is in no span.
        samples = self.order.lookup(found)
        return found[samples.first_token + samples.seq_length > first_token]

    def find_document(self, document: str) -> tuple[str, int, int]:
        """(source, first token in its stream, tokens) of ``SHARD:I``, named as spans name shards.

        Raises ``DataError`` for an unknown shard or document.
        """
        shard, _, number = document.rpartition(":")
        if not number.isdecimal() or shard not in self._shards:
            alike = (
                get_close_matches(shard, self._shards, n=3, cutoff=0.3) or list(self._shards)[:1]
            )
            raise DataError(
                f"--document {document}: write SHARD:I with a shard of the recipe, such as "
                f"{' or '.join(f'{name}:0' for name in alike)}"
            )
        source, label = self._shards[shard]
        return source, *self.shard_sets[source].document_range(label, int(number))

    def text(self, sample: TracedSample, tokenizer: Tokenizer) -> str:
        """The sample's input tokens as text, a line with three dashes where a document ends."""
        shard_set, first, parts = self.shard_sets[sample.source], sample.first_token, []
        for span in sample.spans:
            parts.append(tokenizer.decode(shard_set.read(first, span.num_tokens).tolist()))
            first += span.num_tokens
        return "\n---\n".join(parts)

    def _traced(self, samples: Samples, number: int) -> TracedSample:
        position, source = int(samples.position[number]), self.order.sources[samples.source[number]]
        first, length = int(samples.first_token[number]), int(samples.seq_length[number])
        return TracedSample(
            position=position,
            consumed_tokens=self.schedule.consumed_at(position),
            phase=self.schedule.stretches[bisect_right(self._phase_starts, position) - 1].phase,
            source=source,
            epoch=int(samples.epoch[number]),
            seq_length=length,
            first_token=first,
            spans=tuple(
                replace(span, shard=self._names[source, span.shard])
                for span in self.shard_sets[source].spans(first, length)
            ),
        )


def open_trace(target: Path, overrides: Sequence[str] = ()) -> Trace | VideoTrace:
    """The trace of a recipe file or a run folder. Raises ``UserError`` for what is wrong in it."""
    recipe, ledger = _read_target(target, overrides)
    check_recipe(recipe)
    known = read_known(target)
    if isinstance(recipe, VideoRecipe):
        data = open_video_data(recipe)
        _check_data(known, data.train)
        return VideoTrace(recipe, data, ledger)
    schedule, sources = ledger_schedule(ledger), recipe.data.sources
    shard_sets = {
        name: open_shards(sources[name].shards, name=name)
        for name in schedule.sources
        if name in sources
    }
    _check_data(known, shard_sets)
    order = SampleOrder(
        schedule,
        {name: shard_set.num_tokens for name, shard_set in shard_sets.items()},
        seed=recipe.seed,
        sources=sources,
        chunk_tokens=recipe.data.chunk_tokens,
    )
    return Trace(recipe, order, shard_sets)


_NOT_AS_READ = "what trace says would not be what the run read; put back what was there"


def _check_data(known: KnownData | None, train: Mapping[str, AnyShards]) -> None:
    """Raise ``CheckpointError`` where the shards are not those of the run: no answer is true."""
    if known is not None:
        check_unchanged(known, files_of(train, {}), remedy=_NOT_AS_READ)


def _read_target(
    target: Path, overrides: Sequence[str]
) -> tuple[Recipe | VideoRecipe, tuple[Entry, ...]]:
    """The recipe, and the ledger of the run or of one that would start now."""
    if not target.is_dir():
        recipe = load_recipe(target, overrides)
        return recipe, open_ledger(recipe.curriculum)
    if not (target / "recipe.yaml").is_file():
        raise RecipeError(f"{target}: no recipe.yaml in it; give a recipe or the folder of a run")
    if overrides:
        raise RecipeError(f"{target}: a run's recipe is fixed; --set works on a recipe file only")
    recipe, ledger = load_recipe(target / "recipe.yaml"), target / "ledger.jsonl"
    return recipe, read_ledger(ledger) if ledger.exists() else open_ledger(recipe.curriculum)


def trace_command(
    target: Path,
    *,
    position: int = 0,
    count: int = 1,
    token: int | None = None,
    document: str | None = None,
    text: bool = False,
    as_json: bool = False,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """The lines that ``megatron-curr trace`` prints, one a sample.

    With ``token`` they begin at the sample that consumes it, not at ``position``; with ``document``
    they are all that read it, from the first. Raises ``UserError``.
    """
    trace = open_trace(target, overrides)
    if document is not None:
        positions = trace.positions_of(document)
        if not len(positions) and not as_json:
            yield f"{document} is not read in this run of {trace.schedule.total_tokens:,} tokens"
    else:
        positions = _positions(trace.schedule, position, count, token)
    if isinstance(trace, VideoTrace):
        for place in positions:
            row = trace.row(int(place), with_text=text)
            yield from [row_as_json(row)] if as_json else row_as_text(row)
        return
    tokenizer = load_tokenizer_of(target, trace.recipe.data.tokenizer) if text else None
    for sample in trace.samples(np.asarray(positions, np.int64)):
        decoded = trace.text(sample, tokenizer) if tokenizer else None
        yield _as_json(sample, decoded) if as_json else _as_line(sample, decoded)


def _positions(schedule: Schedule, position: int, count: int, token: int | None) -> range:
    """The samples, or lots, that were asked for. Raises ``DataError`` for one outside the run."""
    total = schedule.total_samples
    if token is not None:
        if not 0 <= token < schedule.total_tokens:
            raise DataError(
                f"token {token:,}: the run has tokens 0 to {schedule.total_tokens - 1:,}"
            )
        position = schedule.position_of(token)
    if not 0 <= position < total:
        raise DataError(f"position {position:,}: the run has positions 0 to {total - 1:,}")
    return range(position, min(position + count, total))


def _as_json(sample: TracedSample, text: str | None) -> str:
    row = asdict(sample)
    return json.dumps(row if text is None else {**row, "text": text}, ensure_ascii=False)


def _as_line(sample: TracedSample, text: str | None) -> str:
    spans = ", ".join(
        f"{span.shard}:{span.document}[{span.first_token}+{span.num_tokens}]"
        for span in sample.spans
    )
    line = (
        f"position {sample.position}  token {sample.consumed_tokens}  {sample.phase}  "
        f"{sample.source}  epoch {sample.epoch}  {spans}"
    )
    return line if text is None else f"{line}\n{text}\n"
