"""Batches of text for one data-parallel rank: what a step reads, and what is held out.

Legend: B rows of a micro-batch, S tokens of a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_curr.curriculum.schedule import Schedule, StepPlan
from megatron_curr.data.order import SampleOrder
from megatron_curr.data.read_ahead import PREFETCHED_STEPS, AheadLoader
from megatron_curr.data.shards import ShardSet
from megatron_curr.data.windows import Ints, Row, Windows, cut_rows, cut_windows
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch on the CPU, whole sequences; int64 but for the mask."""

    tokens_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor  # float32, 1 where a label counts
    document_ids_BS: Tensor | None  # None where documents are not isolated
    source_index_B: Tensor  # into the order's sources
    positions_B: Tensor  # in the run's sample order; -1 for padding
    identities_B: Tensor  # the 64 bits of ``SampleOrder.identities``; 0 for held-out text

    @property
    def seq_length(self) -> int:
        return self.tokens_BS.shape[1]


class Loader(AheadLoader[Batch]):
    """Reads this rank's share of every step of a text run.

    ``shard_sets`` is by source name. A rank reads the ``dp_rank``-th of ``dp_size`` equal runs of a
    step's positions, in micro-batches of ``micro_batch_tokens``. With a ``vocab_size``, every id
    read is checked against it.
    """

    def __init__(
        self,
        recipe: Recipe,
        schedule: Schedule,
        order: SampleOrder,
        shard_sets: Mapping[str, ShardSet],
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_tokens: int,
        vocab_size: int | None = None,
        prefetched_steps: int = PREFETCHED_STEPS,
    ) -> None:
        numbered_sets = [shard_sets[source] for source in order.sources]
        isolate_documents = recipe.data.isolate_documents

        def read(plan: StepPlan) -> list[Batch]:
            rows = micro_batch_rows(plan, dp_size=dp_size, micro_batch_tokens=micro_batch_tokens)
            num_samples = plan.num_samples // dp_size
            first = plan.position + dp_rank * num_samples
            samples = order.lookup(np.arange(first, first + num_samples, dtype=np.int64))
            windows = cut_windows(
                numbered_sets, samples, isolate_documents=isolate_documents, vocab_size=vocab_size
            )
            words = order.identities(samples).view(np.int64)
            return _split(windows, samples.source, samples.position, words, rows=rows)

        super().__init__(read, schedule, prefetched_steps=prefetched_steps)


def micro_batch_rows(plan: StepPlan, *, dp_size: int, micro_batch_tokens: int) -> int:
    """Rows of a micro-batch. Raises ``RecipeError`` where the step is not whole micro-batches."""
    rows = micro_batch_tokens // plan.seq_length
    if rows == 0 or plan.num_samples % (rows * dp_size):
        raise RecipeError(
            f"step {plan.step} (phase {plan.phase!r}): {plan.num_samples} samples of "
            f"{plan.seq_length} tokens do not split into micro-batches of {micro_batch_tokens} "
            f"tokens on {dp_size} data-parallel ranks; make global_batch_tokens a multiple of "
            f"{max(rows, 1) * plan.seq_length * dp_size}"
        )
    return rows


def num_heldout_batches(
    shard_set: ShardSet,
    *,
    seq_length: int,
    num_tokens: int,
    micro_batch_tokens: int,
    dp_size: int = 1,
) -> int:
    """How many batches every data-parallel rank gets from ``heldout_batches``."""
    labels = min(num_tokens, shard_set.num_tokens - 1)
    rows = max(micro_batch_tokens // seq_length, 1)
    return math.ceil(labels / (rows * dp_size * seq_length))


def heldout_batches(
    shard_set: ShardSet,
    *,
    seq_length: int,
    num_tokens: int,
    micro_batch_tokens: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    isolate_documents: bool = False,
    vocab_size: int | None = None,
    source_index: int = 0,
) -> Iterator[Batch]:
    """This rank's part of the first ``num_tokens`` held-out labels, each counted once.

    Every rank gets the same number of whole micro-batches: what is missing at the end is rows of
    zeros with a loss mask of 0.
    """
    labels = min(num_tokens, shard_set.num_tokens - 1)
    per_rank = num_heldout_batches(
        shard_set,
        seq_length=seq_length,
        num_tokens=num_tokens,
        micro_batch_tokens=micro_batch_tokens,
        dp_size=dp_size,
    )
    num_rows = max(micro_batch_tokens // seq_length, 1)
    for number in range(dp_rank * per_rank, (dp_rank + 1) * per_rank):
        windows = range(number * num_rows, (number + 1) * num_rows)
        rows = [
            Row(
                shard_set,
                window * seq_length,
                min(max(labels - window * seq_length, 0), seq_length),
            )
            for window in windows
        ]
        positions = [
            window if row.num_labels else -1 for window, row in zip(windows, rows, strict=True)
        ]
        cut = cut_rows(rows, seq_length, isolate_documents=isolate_documents, vocab_size=vocab_size)
        sources = np.full(num_rows, source_index, np.int64)
        unnamed = np.zeros(num_rows, np.int64)
        yield _split(cut, sources, np.array(positions, np.int64), unnamed, rows=num_rows)[0]


def _split(
    windows: Windows, sources: Ints, positions: Ints, identities: Ints, *, rows: int
) -> list[Batch]:
    """Windows in runs of ``rows``."""
    documents = windows.document_ids_BS
    columns = (
        windows.tokens_BS,
        windows.labels_BS,
        windows.loss_mask_BS,
        documents,
        sources,
        positions,
        identities,
    )
    parts = [
        None if column is None else torch.split(torch.from_numpy(column), rows)
        for column in columns
    ]
    return [
        Batch(*(None if part is None else part[number] for part in parts))  # type: ignore[arg-type]
        for number in range(len(sources) // rows)
    ]
