"""Memory of a rank, by pipeline stage and by what it is for.

States: a bf16 run holds weights of 2 bytes, gradients of 4 (they are summed in fp32) and, for Adam,
an fp32 copy and two moments: 12, which the distributed optimizer shares out over the data and
context ranks (Rajbhandari et al. 2020, ZeRO-1, arXiv:1910.02054). An fp32 run: 4, 4 and 8.

Micro-batches in flight follow the schedules of Narayanan et al. 2021 (arXiv:2104.04473): stage
``p`` of ``P`` holds ``P - p`` of them (1F1B), and interleaved, with ``V`` chunks, ``2 (P - p - 1) +
(V - 1) P + 1`` chunks' worth.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_curr.plan.activations import MicroBatch, checkpoint_bytes
from megatron_curr.plan.architecture import (
    kept_of_input,
    kept_of_layer,
    kept_of_output,
    stage_weights,
)
from megatron_curr.plan.layout import Axes, Stage

GRADIENT_BYTES = 4
CONTEXT_BYTES = 2 * 2**30
"""Assumed: the CUDA context and its kernels, NCCL's buffers, cuBLAS's workspaces."""
FRAGMENTATION_FRAC = 0.05
"""Assumed: what the allocator loses of the memory that comes and goes within a step."""


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes on each rank of a pipeline stage."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass, of all micro-batches in flight
    workspace: float  # comes and goes within a layer, or is recomputed
    buffers: float  # of messages
    margin: float  # fragmentation and what the process needs besides

    @property
    def total(self) -> float:
        """The most that is held at one time."""
        parts: list[float] = [getattr(self, field.name) for field in fields(self)]
        return sum(parts)


@dataclass(frozen=True, slots=True)
class HeldWeights:
    """Numbers that a rank holds of the weights; experts are shared out over other ranks."""

    dense: float
    expert: float

    @property
    def total(self) -> float:
        """Both."""
        return self.dense + self.expert


def stage_memory(
    batch: MicroBatch, stage: Stage, *, axes: Axes, num_micro_batches: int
) -> StageMemory:
    """What each rank of the stage holds at the worst moment of a step."""
    held = held_weights(batch, stage)
    activations = activation_bytes(batch, stage, num_micro_batches=num_micro_batches)
    workspace, buffers = _workspace_bytes(batch, stage), _buffer_bytes(batch, axes, stage)
    moving = activations + workspace + buffers
    return StageMemory(
        parameters=held.total * batch.element_bytes,
        gradients=held.total * GRADIENT_BYTES,
        optimizer=optimizer_bytes(batch, held, axes=axes),
        activations=activations,
        workspace=workspace,
        buffers=buffers,
        margin=CONTEXT_BYTES + FRAGMENTATION_FRAC * moving,
    )


def held_weights(batch: MicroBatch, stage: Stage) -> HeldWeights:
    """What one rank of the stage holds of the weights."""
    parallel = batch.parallel
    ranks = {
        "whole": 1,
        "tensor": parallel.tensor_model_parallel_size,
        "experts": parallel.expert_model_parallel_size * parallel.expert_tp_size,
    }
    dense = expert = 0.0
    for weight in stage_weights(batch, stage):
        part = weight.size / ranks[weight.cut]
        if weight.cut == "experts":
            expert += part
        else:
            dense += part
    return HeldWeights(dense, expert)


def optimizer_bytes(batch: MicroBatch, held: HeldWeights, *, axes: Axes) -> float:
    """Adam's moments, for bf16 the fp32 copy, and the moving average where one is kept."""
    per_weight = state_bytes(batch.precision, keeps_average=batch.keeps_average)
    if not batch.parallel.use_distributed_optimizer:
        return held.total * per_weight
    shared = held.dense / axes.data_and_context.size + held.expert / axes.expert_data.size
    return shared * per_weight


def state_bytes(precision: str, *, keeps_average: bool) -> int:
    """Optimizer state of one weight, in fp32: copy, two moments, average."""
    return 4 * ((precision == "bf16") + 2 + keeps_average)


def chunks_in_flight(stage: Stage, num_micro_batches: int) -> int:
    """Chunks' worth of activations that the stage holds at its worst moment."""
    behind, num_chunks = stage.num_stages - stage.index - 1, len(stage.chunks)
    if num_chunks == 1:
        return min(behind + 1, num_micro_batches)
    return min(2 * behind + (num_chunks - 1) * stage.num_stages + 1, num_micro_batches * num_chunks)


def activation_bytes(batch: MicroBatch, stage: Stage, *, num_micro_batches: int) -> float:
    """Kept for backward passes at the stage's worst moment."""
    in_flight = chunks_in_flight(stage, num_micro_batches)
    by_chunk = [_chunk_bytes(batch, chunk) for chunk in stage.chunks]
    kept = in_flight * sum(by_chunk) / len(by_chunk)
    if stage.has_embedding:
        kept += kept_of_input(batch) * in_flight / len(by_chunk)
    if stage.has_output:
        kept += kept_of_output(batch)  # its backward pass follows at once
    return kept


def _chunk_bytes(batch: MicroBatch, layers: tuple[int, ...]) -> int:
    """Kept of one micro-batch in a chunk of layers."""
    parallel = batch.parallel
    whole = [kept_of_layer(batch, layer) for layer in layers]
    if parallel.recompute_granularity != "full":
        return sum(whole)
    unit = parallel.recompute_num_layers or 1
    if parallel.recompute_method == "block":
        return min(unit, len(layers)) * checkpoint_bytes(batch) + sum(whole[unit:])
    return -(-len(layers) // unit) * checkpoint_bytes(batch)


def _workspace_bytes(batch: MicroBatch, stage: Stage) -> float:
    """The larger of what a layer's backward pass and the loss's need for a moment."""
    model, parallel, size = batch.model, batch.parallel, batch.element_bytes
    # The gathered input and its gradient, then gradients on both sides of the activation function.
    layer = 0.0
    if not all(map(batch.has_experts, stage.layers)):
        widths = 2 * model.hidden_size + 3 * model.ffn_hidden_size // batch.tp_size
        layer = size * batch.tokens * widths
    if any(map(batch.has_experts, stage.layers)):
        width = batch.text.expert_ffn_hidden_size // parallel.expert_tp_size
        layer = max(layer, size * batch.routed_tokens * (2 * model.hidden_size + 3 * width))
    if parallel.recompute_granularity == "full":
        unit = 1 if parallel.recompute_method == "block" else parallel.recompute_num_layers or 1
        layer += unit * max(kept_of_layer(batch, held) for held in stage.layers)
    loss = 0.0
    if stage.has_output:  # logits and their gradient, and the output layer's
        loss = 2 * size * batch.tokens * batch.vocab_size / batch.tp_size
    matrices = [w.size / batch.tp_size for w in stage_weights(batch, stage) if w.cut == "tensor"]
    return max(layer, loss) + size * max(matrices)


def _buffer_bytes(batch: MicroBatch, axes: Axes, stage: Stage) -> float:
    """Of messages between pipeline stages, context ranks and expert ranks."""
    model, parallel, size = batch.model, batch.parallel, batch.element_bytes
    hidden = batch.sharded_tokens * model.hidden_size * size
    total = 0.0
    if axes.pipeline.size > 1:
        total += hidden * (4 if len(stage.chunks) > 1 else 2)
    if axes.context.size > 1:
        # Keys and values, and their gradients in fp32, held and coming; or of all ranks at once.
        key_values = batch.tokens * batch.key_value_width
        copies = {"all_gather": axes.context.size, "a2a": 0}
        total += (size + 4) * key_values * copies.get(parallel.context_parallel_exchange, 2)
    if axes.expert.size > 1:
        total += 2 * batch.routed_tokens * model.hidden_size * size
    return total
