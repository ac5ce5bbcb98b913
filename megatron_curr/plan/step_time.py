"""How long a step takes: matrices, messages that nothing hides, the pipeline's bubble, the update.

A pipeline of ``P`` stages with ``V`` chunks each works through ``m`` micro-batches in the time of
``m + (P - 1) / V`` of them (Narayanan et al. 2021, arXiv:2104.04473, section 2.2), at the pace of
its slowest stage. Kernels reach ``kernel_frac`` of the GPU's peak, which is fitted to published
runs (``docs/plan.md``), and messages ``LINK_FRAC`` of their link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.architecture import (
    attention_forward_flops,
    layer_forward_flops,
    layer_recomputed_flops,
    output_forward_flops,
)
from megatron_curr.plan.cluster import Cluster
from megatron_curr.plan.flops import BACKWARD, causal_keys
from megatron_curr.plan.layout import Axes, Stage
from megatron_curr.plan.memory import held_weights
from megatron_curr.plan.traffic import LINK_FRAC, messages

UPDATE_BYTES = 40
"""Read and written for each weight that a rank updates: gradient, moments, copy, twice."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step of the whole job, in seconds."""

    compute_s: float  # matrices and attention of the slowest stage, recomputation included
    messages_s: float  # that nothing hides, of all micro-batches
    bubble_s: float  # the slowest stage waiting for others
    gradients_s: float  # what summing gradients and gathering weights adds at the end
    update_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return sum(
            (self.compute_s, self.messages_s, self.bubble_s, self.gradients_s, self.update_s)
        )

    @property
    def bubble_frac(self) -> float:
        """Share of the step."""
        return self.bubble_s / self.total_s


def together(times: Sequence[StepTime]) -> StepTime:
    """One step made of micro-batches of several shapes, with one bubble and one update."""
    return StepTime(
        compute_s=sum(time.compute_s for time in times),
        messages_s=sum(time.messages_s for time in times),
        bubble_s=max(time.bubble_s for time in times),
        gradients_s=max(time.gradients_s for time in times),
        update_s=max(time.update_s for time in times),
    )


def bubble_frac(parallel_stages: int, num_chunks: int, num_micro_batches: int) -> float:
    """Share of a pipeline's time that stages of equal work stand idle."""
    idle = (parallel_stages - 1) / num_chunks
    return idle / (num_micro_batches + idle)


def step_time(
    batch: MicroBatch,
    stages: Sequence[Stage],
    *,
    axes: Axes,
    cluster: Cluster,
    num_micro_batches: float,
    keys_per_token: float | None = None,
) -> StepTime:
    """Expected time of one step, from the layout and what kernels and links are known to reach."""
    gpu = cluster.gpu
    keys = causal_keys(batch.seq_length) if keys_per_token is None else keys_per_token
    pace = gpu.peak_flops * gpu.kernel_frac
    compute = [_stage_flops(batch, stage, keys_per_token=keys) / pace for stage in stages]
    attention = batch.tokens / batch.tp_size * attention_forward_flops(batch, keys_per_token=keys)
    waits = [
        _waits_s(
            batch,
            stage,
            axes=axes,
            cluster=cluster,
            attention_s=len(stage.layers) * (1 + BACKWARD) * attention / pace,
        )
        for stage in stages
    ]
    both = [work + wait for work, wait in zip(compute, waits, strict=True)]
    slowest = max(range(len(stages)), key=both.__getitem__)
    fill = sum(both) / len(both) * (len(stages) - 1) / len(stages[0].chunks)
    return StepTime(
        compute_s=num_micro_batches * compute[slowest],
        messages_s=num_micro_batches * waits[slowest],
        bubble_s=fill,
        gradients_s=max(
            _gradients_s(batch, stage, axes=axes, cluster=cluster, hides_s=work)
            for stage, work in zip(stages, compute, strict=True)
        ),
        update_s=max(_update_s(batch, stage, axes=axes, cluster=cluster) for stage in stages),
    )


def _waits_s(
    batch: MicroBatch, stage: Stage, *, axes: Axes, cluster: Cluster, attention_s: float
) -> float:
    """Of a micro-batch, for messages that nothing hides."""
    total = 0.0
    for message in messages(batch, stage, axes):
        takes_s = message.bytes_per_micro_batch / (message.bandwidth(cluster) * LINK_FRAC)
        if message.is_behind_attention:
            total += max(takes_s - attention_s, 0.0)
        else:
            total += takes_s * (1 - message.hidden_frac)
    return total


def _stage_flops(batch: MicroBatch, stage: Stage, *, keys_per_token: float) -> float:
    """Of one micro-batch on one rank of the stage, both passes and what is recomputed."""
    per_token = 0.0
    for chunk in stage.chunks:
        for place, layer in enumerate(chunk):
            forward = layer_forward_flops(batch, layer, keys_per_token=keys_per_token)
            per_token += (1 + BACKWARD) * forward + layer_recomputed_flops(
                batch, layer, place_in_chunk=place, keys_per_token=keys_per_token
            )
    if stage.has_output:
        per_token += (1 + BACKWARD) * output_forward_flops(batch)
    return batch.tokens * per_token / batch.tp_size


def _gradients_s(
    batch: MicroBatch, stage: Stage, *, axes: Axes, cluster: Cluster, hides_s: float
) -> float:
    """Summing gradients hides behind the last backward pass, gathering behind the next forward."""
    total = 0.0
    for message in messages(batch, stage, axes):
        if not message.bytes_per_step:
            continue
        takes_s = message.bytes_per_step / (message.bandwidth(cluster) * LINK_FRAC)
        passes = BACKWARD if "gather" not in message.what else 1
        hidden_s = message.hidden_frac * hides_s * passes / (1 + BACKWARD)
        total += max(takes_s - hidden_s, 0.0)
    return total


def _update_s(batch: MicroBatch, stage: Stage, *, axes: Axes, cluster: Cluster) -> float:
    held = held_weights(batch, stage)
    numbers = held.total
    if batch.parallel.use_distributed_optimizer:
        numbers = held.dense / axes.data_and_context.size + held.expert / axes.expert_data.size
    return UPDATE_BYTES * numbers / cluster.gpu.memory_bandwidth
