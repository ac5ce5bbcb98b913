"""Stages and axes, against megatron-core's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_curr.models.gpt import transformer_config
from megatron_curr.plan.layout import Axis, axes_of, pipeline_stages
from tests.parallel.layouts import layout, tiny_model
from tests.plan.allocations import Setting, fake_ranks


@pytest.mark.parametrize(
    "sizes",
    [
        {"pp": 1},
        {"pp": 4},
        {"pp": 4, "vpp": 2},
        {"pp": 4, "num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 4},
        {"pp": 3, "vpp": 2, "num_layers_in_last_pipeline_stage": 4},
    ],
)
def test_stages_hold_the_layers_that_megatron_core_gives_them(sizes: dict[str, Any]) -> None:
    parallel = layout(**sizes)
    config = transformer_config(tiny_model(num_layers=16), parallel=parallel, precision="bf16")
    for stage in pipeline_stages(16, parallel):
        for number, chunk in enumerate(stage.chunks):
            where = {"vp_stage": number if len(stage.chunks) > 1 else None, "pp_rank": stage.index}
            assert len(chunk) == get_num_layers_to_build(config, **where)
            assert chunk[0] == get_transformer_layer_offset(config, **where)


def ranks_of(axis: Axis, rank: int) -> list[int]:
    """The group of a rank, by size and stride."""
    first = rank - rank // axis.stride % axis.size * axis.stride
    return [first + place * axis.stride for place in range(axis.size)]


@pytest.mark.parametrize("rank", [0, 13])
def test_axes_are_those_of_the_process_groups(rank: int) -> None:
    parallel = layout(tp=2, cp=2, pp=2, ep=2, etp=1, sequence_parallel=True)
    model = tiny_model(num_moe_experts=4)
    axes = axes_of(parallel, 32)
    with fake_ranks(Setting(model, parallel, rank=rank, world_size=32)) as groups:
        made = groups.pg_collection
        for axis, group in (
            (axes.tensor, made.tp),
            (axes.context, made.cp),
            (axes.data, made.dp),
            (axes.data_and_context, made.dp_cp),
            (axes.pipeline, made.pp),
            (axes.expert, made.ep),
            (axes.expert_data, made.expt_dp),
        ):
            assert sorted(ranks_of(axis, rank)) == sorted(dist.get_process_group_ranks(group))
