"""What ranks send, against the collectives that megatron-core's modules issue."""

from __future__ import annotations

from collections import defaultdict

import pytest

from megatron_curr.plan.cluster import Cluster, find_gpu
from megatron_curr.plan.layout import Axis, axes_of, pipeline_stages
from megatron_curr.plan.traffic import messages
from tests.plan.allocations import SentBytes, Setting, build_chunks, fake_ranks, forward
from tests.plan.test_memory import EXPERTS, micro_batch, setting

WITHIN = 0.02
LAYOUTS = {
    "tensor": setting(tp=2, world_size=2),
    "sequence": setting(tp=2, sequence_parallel=True, world_size=2),
    "sequence, all recomputed": setting(
        tp=2, sequence_parallel=True, world_size=2, recompute="full"
    ),
    "ring": setting(cp=2, world_size=2),
    "gather of keys": setting(cp=2, world_size=2, context_parallel_exchange="all_gather"),
    "heads": setting(cp=2, world_size=2, context_parallel_exchange="a2a"),
    "experts": setting(model=EXPERTS, ep=2, world_size=2),
}


def counted(given: Setting) -> dict[str, float]:
    """Bytes of one micro-batch on one rank, by axis."""
    axes = axes_of(given.parallel, given.world_size)
    (stage,) = pipeline_stages(given.model.num_layers, given.parallel)
    total: dict[str, float] = defaultdict(float)
    for message in messages(micro_batch(given), stage, axes):
        total[message.axis.name] += message.bytes_per_micro_batch
    return {name: size for name, size in total.items() if size}


def sent(given: Setting) -> int:
    """Bytes that the modules send for it."""
    with fake_ranks(given) as groups:
        (chunk,) = build_chunks(given, groups)
        with SentBytes() as seen:
            forward(given, chunk, groups).sum().backward()
    return sum(seen.by_name.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_are_those_that_the_collectives_carry(name: str) -> None:
    given = LAYOUTS[name]
    assert sum(counted(given).values()) == pytest.approx(sent(given), rel=WITHIN)


def cluster(num_nodes: int = 4) -> Cluster:
    return Cluster(num_nodes=num_nodes, gpus_per_node=8, gpu=find_gpu("h100-80gb"))


@pytest.mark.parametrize(
    ("axis", "near", "gb_s"),
    [
        (Axis("tensor", 8, 1), 8, 450),  # fills a node
        (Axis("data", 4, 8), 1, 50),  # one rank a node: one adapter
        (Axis("data", 16, 2), 4, 200),  # four ranks a node share the ring out
        (Axis("data", 32, 1), 8, 400),  # all of them
    ],
)
def test_a_ring_runs_at_the_pace_of_its_slowest_link(axis: Axis, near: int, gb_s: int) -> None:
    assert axis.on_one_node(cluster()) == near
    assert axis.bandwidth(cluster()) == pytest.approx(gb_s * 1e9)


def test_distributed_optimizer_scatters_gradients_and_gathers_weights() -> None:
    given = setting(distributed_optimizer=True, world_size=4)
    axes = axes_of(given.parallel, 4)
    (stage,) = pipeline_stages(given.model.num_layers, given.parallel)
    scatter, gather = messages(micro_batch(given), stage, axes)
    assert scatter.bytes_per_step == 2 * gather.bytes_per_step  # fp32 gradients, bf16 weights
    (reduce,) = messages(micro_batch(setting(world_size=4)), stage, axes)
    assert reduce.bytes_per_step == 2 * scatter.bytes_per_step
