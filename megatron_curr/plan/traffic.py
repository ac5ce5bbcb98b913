"""What ranks send each other in a step: bytes by axis, kind and link.

Counted for the pipeline stage that sends most of a kind, and as a ring passes it on: an all-gather
or reduce-scatter of ``n`` bytes over ``r`` ranks sends ``n (r - 1) / r`` from each, an all-reduce
twice that (Thakur, Rabenseifner and Gropp 2005). Tensor-parallel counts are those of Korthikanti et
al. 2022 (arXiv:2205.05198, section 4.2.2): per layer and pass, two gathers and two scatters, and
going back the inputs of both column-parallel matrices are gathered once more, beside their product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.cluster import Cluster
from megatron_curr.plan.layout import Axes, Axis, Stage
from megatron_curr.plan.memory import GRADIENT_BYTES, held_weights
from megatron_curr.recipe.context_rules import hierarchical_sizes
from megatron_curr.recipe.model import Model

LINK_FRAC = 0.8
"""Assumed: the part of a link's advertised rate that large messages reach."""

Kind = Literal["ring", "all to all", "neighbour"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one rank sends of one kind."""

    axis: Axis
    what: str
    kind: Kind
    bytes_per_micro_batch: float = 0
    bytes_per_step: float = 0  # besides, once a step
    hidden_frac: float = 0  # of the bytes that may travel while the rank computes
    is_behind_attention: bool = False  # it is attention alone that they travel beside

    def step_bytes(self, num_micro_batches: float) -> float:
        """In a whole step."""
        return self.bytes_per_micro_batch * num_micro_batches + self.bytes_per_step

    def bandwidth(self, cluster: Cluster) -> float:
        """Advertised, bytes/s one way."""
        if self.kind == "all to all":
            return self.axis.all_to_all_bandwidth(cluster)
        if self.kind == "neighbour" and self.axis.on_one_node(cluster) == 1:
            return cluster.gpu.network_bandwidth
        return self.axis.bandwidth(cluster)

    def seconds(self, cluster: Cluster, num_micro_batches: float) -> float:
        """What a step's messages of this kind take, were nothing to hide them."""
        return self.step_bytes(num_micro_batches) / (self.bandwidth(cluster) * LINK_FRAC)


def messages(batch: MicroBatch, stage: Stage, axes: Axes) -> list[Message]:
    """Everything that a rank of this stage sends."""
    found = [
        *_tensor(batch, stage, axes),
        *_context(batch, stage, axes),
        *_experts(batch, stage, axes),
        *_pipeline(batch, stage, axes),
        *_data(batch, stage, axes),
    ]
    return [message for message in found if message.axis.size > 1]


def _passes(batch: MicroBatch) -> int:
    """Forward passes of a layer: one more where all of it is recomputed."""
    return 2 if batch.parallel.recompute_granularity == "full" else 1


def _tensor(batch: MicroBatch, stage: Stage, axes: Axes) -> Iterator[Message]:
    size = axes.tensor.size
    hidden = batch.tokens * batch.model.hidden_size * batch.element_bytes
    share = hidden * (size - 1) / size
    forward, backward, beside = (2, 2, 1) if batch.parallel.sequence_parallel else (2, 2, 0)
    blocks = sum(_blocks(batch, layer) for layer in stage.layers)
    moved = forward * _passes(batch) + backward + beside
    ends = (2 + beside) * stage.has_output + 2 * stage.has_embedding
    yield Message(
        axes.tensor,
        "layer inputs: gather, scatter" if beside else "layer outputs: all-reduce",
        "ring",
        bytes_per_micro_batch=share * (moved * blocks + ends),
        hidden_frac=beside / moved,
    )


def _blocks(batch: MicroBatch, layer: int) -> int:
    """Attention and MLP of a layer, as far as they are cut over the tensor ranks."""
    if not isinstance(batch.model, Model):
        return 3  # and attention to the text
    if batch.has_experts(layer) and not batch.text.moe_shared_expert_intermediate_size:
        return 1
    return 2


def _context(batch: MicroBatch, stage: Stage, axes: Axes) -> Iterator[Message]:
    """Attention's exchange, forwards and backwards; gradients of keys and values are fp32."""
    model, parallel, size = batch.model, batch.parallel, batch.element_bytes
    ranks, layers, passes = axes.context.size, len(stage.layers), _passes(batch)
    query = batch.tokens * batch.query_width
    key_values = batch.tokens * batch.key_value_width
    exchange = parallel.context_parallel_exchange
    levels = hierarchical_sizes(model, parallel) or (
        [ranks, 1] if exchange == "a2a" else [1, ranks]
    )
    by_heads, in_ring = levels
    if by_heads > 1:
        near = Axis("context", by_heads, axes.context.stride)
        moved = size * (2 * query + key_values) * (by_heads - 1) / by_heads
        yield Message(
            near,
            "attention: heads for sequence",
            "all to all",
            bytes_per_micro_batch=layers * (passes + 1) * moved,
        )
    if in_ring > 1:
        far = Axis("context", in_ring, axes.context.stride * by_heads)
        moved = key_values * (in_ring - 1) * (size * (passes + 1) + GRADIENT_BYTES)
        yield Message(
            far,
            "attention: keys, values" + (", all at once" if exchange == "all_gather" else ""),
            "ring",
            bytes_per_micro_batch=layers * moved,
            hidden_frac=0.0 if exchange == "all_gather" else 1.0,
            is_behind_attention=exchange != "all_gather",
        )


def _experts(batch: MicroBatch, stage: Stage, axes: Axes) -> Iterator[Message]:
    """Rows to their experts and back, in both passes; cut experts gather what arrives."""
    layers = sum(map(batch.has_experts, stage.layers))
    if not layers:
        return
    model, size = batch.text, batch.element_bytes
    again = 0 if not batch.recomputes("moe") else 1
    trips = 2 * (_passes(batch) + again + 1)
    rows = batch.sharded_tokens * model.moe_router_topk * model.hidden_size * size
    ranks, cut = axes.expert.size, axes.expert_tensor.size
    yield Message(
        axes.expert,
        "rows to experts and back",
        "all to all",
        bytes_per_micro_batch=layers * trips * rows * (ranks - 1) / ranks,
    )
    if cut > 1:
        yield Message(
            axes.expert_tensor,
            "rows of cut experts: gather, scatter",
            "ring",
            bytes_per_micro_batch=layers * trips * rows * (cut - 1),
        )


def _pipeline(batch: MicroBatch, stage: Stage, axes: Axes) -> Iterator[Message]:
    hidden = batch.sharded_tokens * batch.model.hidden_size * batch.element_bytes
    yield Message(
        axes.pipeline,
        "activations and their gradients",
        "neighbour",
        bytes_per_micro_batch=2 * hidden * len(stage.chunks),
        hidden_frac=1.0 if len(stage.chunks) > 1 else 0.0,
    )


def _data(batch: MicroBatch, stage: Stage, axes: Axes) -> Iterator[Message]:
    """Gradients in fp32, summed once a step; updated weights where the optimizer is shared out."""
    parallel, held = batch.parallel, held_weights(batch, stage)
    for axis, numbers, what in (
        (axes.data_and_context, held.dense, "gradients"),
        (axes.expert_data, held.expert, "experts' gradients"),
    ):
        if not numbers:
            continue
        share = numbers * (axis.size - 1) / axis.size
        if not parallel.use_distributed_optimizer:
            yield Message(
                axis,
                f"{what}: all-reduce",
                "ring",
                bytes_per_step=2 * GRADIENT_BYTES * share,
                hidden_frac=float(parallel.overlap_grad_reduce),
            )
            continue
        yield Message(
            axis,
            f"{what}: scatter",
            "ring",
            bytes_per_step=GRADIENT_BYTES * share,
            hidden_frac=float(parallel.overlap_grad_reduce),
        )
        yield Message(
            axis,
            f"{what.replace('gradients', 'weights')}: gather",
            "ring",
            bytes_per_step=batch.element_bytes * share,
            hidden_frac=float(parallel.overlap_param_gather),
        )
