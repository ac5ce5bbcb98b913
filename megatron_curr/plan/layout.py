"""Who holds what: the layers of every pipeline stage, and how near the ranks of an axis are.

Ranks are numbered as ``parallel/groups.py`` numbers them, megatron-core's order ``tp-cp-ep-dp-pp``:
tensor ranks are neighbours, then context, then data; pipeline stages are farthest apart. Experts
count the same ranks as expert-tensor, expert, expert-data, pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from megatron_curr.plan.cluster import Cluster
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage: what each of its ranks holds a part of."""

    index: int
    num_stages: int
    chunks: tuple[tuple[int, ...], ...]  # layers, counted from 0, of each virtual stage

    @property
    def layers(self) -> tuple[int, ...]:
        """All of them."""
        return tuple(layer for chunk in self.chunks for layer in chunk)

    @property
    def has_embedding(self) -> bool:
        """The table in front of the first layer is here."""
        return self.index == 0

    @property
    def has_output(self) -> bool:
        """The last norm, the output layer and the loss are here."""
        return self.index == self.num_stages - 1


def pipeline_stages(num_layers: int, parallel: Parallel) -> tuple[Stage, ...]:
    """The stages in order; interleaved, a stage holds every ``num_stages``-th chunk of layers."""
    num_stages = parallel.pipeline_model_parallel_size
    num_chunks = parallel.virtual_pipeline_model_parallel_size or 1
    sizes = _stage_sizes(num_layers, parallel)
    chunks: list[list[tuple[int, ...]]] = [[] for _ in sizes]
    first = 0
    for _ in range(num_chunks):
        for stage, size in enumerate(sizes):
            chunks[stage].append(tuple(range(first, first + size // num_chunks)))
            first += size // num_chunks
    return tuple(Stage(index, num_stages, tuple(held)) for index, held in enumerate(chunks))


def _stage_sizes(num_layers: int, parallel: Parallel) -> list[int]:
    first = parallel.num_layers_in_first_pipeline_stage
    last = parallel.num_layers_in_last_pipeline_stage
    given = [size for size in (first, last) if size is not None]
    others = parallel.pipeline_model_parallel_size - len(given)
    middle = [(num_layers - sum(given)) // others] * others if others else []
    return [*([first] if first else []), *middle, *([last] if last else [])]


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks that share one thing out: ``size`` of them, ``stride`` apart."""

    name: str
    size: int
    stride: int

    def on_one_node(self, cluster: Cluster) -> int:
        """How many of a group's ranks stand on the same node."""
        return max(min(self.size, cluster.gpus_per_node // self.stride), 1)

    def bandwidth(self, cluster: Cluster) -> float:
        """Bytes/s that a rank can pass on in a ring over the group, one way.

        A ring that leaves the node uses the network adapters of all its ranks there, each for a
        part of the message (NCCL's channels), up to what their links inside the node carry.
        """
        near, gpu = self.on_one_node(cluster), cluster.gpu
        if near == self.size:
            return gpu.nvlink_bandwidth
        return min(gpu.nvlink_bandwidth, near * gpu.network_bandwidth)

    def all_to_all_bandwidth(self, cluster: Cluster) -> float:
        """Bytes/s of a rank that sends an equal part to every other rank, one way."""
        near, gpu = self.on_one_node(cluster), cluster.gpu
        if near == self.size:
            return gpu.nvlink_bandwidth
        far_frac = (self.size - near) / (self.size - 1)
        return gpu.network_bandwidth / far_frac

    def link(self, cluster: Cluster) -> str:
        """What the messages travel over, in words."""
        near = self.on_one_node(cluster)
        if near == self.size:
            return "node"
        return "network" if near == 1 else f"network, {near} a node"


@dataclass(frozen=True, slots=True)
class Axes:
    """Every axis of a layout on so many ranks."""

    tensor: Axis
    context: Axis
    data: Axis
    data_and_context: Axis  # gradients are summed, and the optimizer is sharded, over these
    pipeline: Axis
    expert_tensor: Axis
    expert: Axis
    expert_data: Axis


def axes_of(parallel: Parallel, world_size: int) -> Axes:
    """The axes of a layout that the ranks can hold."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    etp = parallel.expert_tp_size
    dp = world_size // (tp * cp * pp)
    return Axes(
        tensor=Axis("tensor", tp, 1),
        context=Axis("context", cp, tp),
        data=Axis("data", dp, tp * cp),
        data_and_context=Axis("data", dp * cp, tp),
        pipeline=Axis("pipeline", pp, world_size // pp),
        expert_tensor=Axis("expert tensor", etp, 1),
        expert=Axis("expert", ep, etp),
        expert_data=Axis("expert data", world_size // (etp * ep * pp), etp * ep),
    )


def padded_vocab_size(vocab_size: int, model: Model, parallel: Parallel) -> int:
    """Rows of the embedding as it is stored: ``models/gpt.py`` pads alike."""
    multiple = lcm(model.make_vocab_size_divisible_by, parallel.tensor_model_parallel_size)
    return -(-vocab_size // multiple) * multiple
