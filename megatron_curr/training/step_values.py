"""What a step's row says that depends on what is trained: losses, amounts by source, FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Protocol

from megatron_curr.curriculum.schedule import StepPlan
from megatron_curr.data.order import SampleOrder
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.data.video_shards import VideoShards
from megatron_curr.plan.flops import model_flops_per_token
from megatron_curr.plan.video_flops import sample_flops
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.step import Loss

# Beyond this many sources a step row lists only those whose count moved: a row must stay small.
LISTED_SOURCES = 64


class StepValues(Protocol):
    """The part of a step's row that a kind of run fills in; on rank 0 only."""

    def of(self, plan: StepPlan, loss: Loss) -> dict[str, float | None]:
        """Values by metric."""


class SourceAmounts:
    """How much has been read of each source."""

    def __init__(self, order: SampleOrder | VideoOrder) -> None:
        self._order = order
        self._before: dict[str, int] = {}

    def of(self, plan: StepPlan) -> dict[str, float]:
        """Tokens and epochs of every source, at the step's end."""
        before = self._before
        consumed = self._order.consumed_tokens(plan.position + plan.num_samples)
        self._before = consumed
        values: dict[str, float] = {}
        for name, size in zip(self._order.sources, self._order.num_tokens.tolist(), strict=True):
            if len(consumed) <= LISTED_SOURCES or consumed[name] != before.get(name):
                values[f"data/{name}/consumed_tokens"] = consumed[name]
                values[f"data/{name}/epochs"] = consumed[name] / size
        return values


class TextValues:
    """Cross-entropy, by source."""

    def __init__(self, recipe: Recipe, order: SampleOrder, *, vocab_size: int) -> None:
        self._order = order
        self._amounts = SourceAmounts(order)
        self._flops_per_token = cache(
            lambda length: model_flops_per_token(
                recipe.model, vocab_size=vocab_size, seq_length=length
            )
        )

    def of(self, plan: StepPlan, loss: Loss) -> dict[str, float | None]:
        """See ``StepValues``."""
        values: dict[str, float | None] = {
            "train/loss_nats_per_token": loss.mean,
            "train/seq_length_tokens": plan.seq_length,
            "train/step_flops": self._flops_per_token(plan.seq_length) * plan.step_tokens,
            **self._amounts.of(plan),
        }
        for index, name in enumerate(self._order.sources):
            mean = loss.mean_of(index)
            if mean is not None:
                values[f"train/{name}/loss_nats_per_token"] = mean
        return values


class VideoValues:
    """Squared error of the velocity, by source and by bucket."""

    def __init__(
        self, recipe: VideoRecipe, order: VideoOrder, shard_sets: Mapping[str, VideoShards]
    ) -> None:
        self._order = order
        self._amounts = SourceAmounts(order)
        cells = list(enumerate(order.cells))
        self._of_source = {
            name: [index for index, cell in cells if cell.source == name] for name in order.sources
        }
        self._of_bucket = {
            name: [index for index, cell in cells if cell.bucket == name]
            for name in dict.fromkeys(cell.bucket for cell in order.cells)
        }
        self._lot_flops = [
            cell.lot_samples
            * sample_flops(
                recipe.model,
                num_patches=cell.sample_tokens,
                text_tokens=round(float(shard_sets[cell.source].text_lengths.mean())),
            )
            for cell in order.cells
        ]

    def of(self, plan: StepPlan, loss: Loss) -> dict[str, float | None]:
        """See ``StepValues``. Texts count with their mean length in ``train/step_flops``."""
        end = plan.position + plan.num_samples
        lots = self._order.lots_before(end) - self._order.lots_before(plan.position)
        values: dict[str, float | None] = {
            "train/flow_mse": loss.mean,
            "train/step_flops": float(lots @ self._lot_flops),
            **self._amounts.of(plan),
        }
        for groups, name_of in (
            (self._of_source, "train/{}/flow_mse"),
            (self._of_bucket, "train/{}/bucket_flow_mse"),
        ):
            for name, indices in groups.items():
                mean = loss.mean_of(*indices)
                if mean is not None:
                    values[name_of.format(name)] = mean
        for name, tokens in self._order.bucket_tokens(end).items():
            values[f"data/{name}/bucket_consumed_tokens"] = tokens
        return values
