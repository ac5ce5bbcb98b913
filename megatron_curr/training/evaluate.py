"""Held-out loss of every source, without a trace in the training state.

Windows are as long as the longest phase's, from the first token to the last of the run, so that
the curve compares like with like; early in a run whose sequences grow it therefore also counts
places that training has not reached yet.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain

import torch

from megatron_curr.data.loader import Batch, heldout_batches, num_heldout_batches
from megatron_curr.data.shards import ShardSet
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training.step import Stepper


class Evaluator:
    """Knows the held-out shards; every rank reads its data-parallel share of them."""

    def __init__(
        self, recipe: Recipe, heldout: Mapping[str, ShardSet], *, groups: Groups, vocab_size: int
    ) -> None:
        self._heldout = dict(heldout)
        self._seq_length = max(phase.seq_length for phase in recipe.curriculum.phases)
        self._num_tokens = recipe.evaluation.tokens_per_source
        self._micro_batch_tokens = recipe.parallel.micro_batch_tokens
        self._isolate_documents = recipe.data.isolate_documents
        self._vocab_size = vocab_size
        self._groups = groups
        # The interleaved pipeline takes micro-batches in whole rounds of its stages.
        is_interleaved = recipe.parallel.virtual_pipeline_model_parallel_size is not None
        self._round = groups.pp_size if is_interleaved else 1

    @property
    def has_sources(self) -> bool:
        """Whether any source has held-out text."""
        return bool(self._heldout)

    def evaluate(self, stepper: Stepper) -> dict[str, float | None]:
        """``eval/...`` values, None where no token counts; the same on every rank. Collective."""
        began_s = time.perf_counter()
        num_batches = sum(
            num_heldout_batches(
                shard_set,
                seq_length=self._seq_length,
                num_tokens=self._num_tokens,
                micro_batch_tokens=self._micro_batch_tokens,
                dp_size=self._groups.dp_size,
            )
            for shard_set in self._heldout.values()
        )
        padding = -num_batches % self._round
        loss = stepper.forward(
            lambda: self._batches(padding),
            num_batches=num_batches + padding,
            num_groups=len(self._heldout),
        )
        values: dict[str, float | None] = {"eval/time_s": time.perf_counter() - began_s}
        for index, name in enumerate(self._heldout):
            values[f"eval/{name}/loss_nats_per_token"] = loss.mean_of(index)
        return values

    def _batches(self, padding: int) -> Iterator[Batch]:
        batches = chain.from_iterable(
            heldout_batches(
                shard_set,
                seq_length=self._seq_length,
                num_tokens=self._num_tokens,
                micro_batch_tokens=self._micro_batch_tokens,
                dp_rank=self._groups.dp_rank,
                dp_size=self._groups.dp_size,
                isolate_documents=self._isolate_documents,
                vocab_size=self._vocab_size,
                source_index=index,
            )
            for index, shard_set in enumerate(self._heldout.values())
        )
        for batch in batches:
            yield batch
        for _ in range(padding):
            yield replace(batch, loss_mask_BS=torch.zeros_like(batch.loss_mask_BS))
