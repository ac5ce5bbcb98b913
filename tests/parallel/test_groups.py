from __future__ import annotations

import pytest
import torch.distributed as dist

from megatron_curr.errors import RecipeError
from megatron_curr.parallel.groups import build_groups, destroy_groups
from tests.parallel.layouts import layout
from tests.ranks import run_ranks


def places_cover_the_layout(rank: int) -> None:
    groups = build_groups(layout(tp=2, cp=2))
    assert (groups.rank, groups.world_size) == (rank, 4)
    sizes = (groups.tp_size, groups.cp_size, groups.pp_size, groups.dp_size)
    assert sizes == (2, 2, 1, 1)
    places: list[tuple[int, int] | None] = [None] * 4
    dist.all_gather_object(places, (groups.tp_rank, groups.cp_rank))
    assert sorted(places) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    destroy_groups()
    assert build_groups(layout(pp=2)).dp_size == 2
    destroy_groups()
    groups = build_groups(layout(tp=2, ep=2, etp=1))
    assert (groups.ep_size, groups.etp_size, groups.tp_size, groups.dp_size) == (2, 1, 2, 2)
    destroy_groups()
    groups = build_groups(layout(tp=2, ep=2))
    assert (groups.ep_size, groups.etp_size, groups.etp_rank) == (2, 2, groups.tp_rank)
    destroy_groups()
    with pytest.raises(RecipeError, match=r"4 ranks do not fit expert 8 .* multiple of 8"):
        build_groups(layout(ep=8))
    with pytest.raises(RecipeError, match=r"4 ranks do not fit tensor 3 .* multiple of 3"):
        build_groups(layout(tp=3))
    with pytest.raises(RecipeError, match="virtual_pipeline_model_parallel_size=2 needs"):
        build_groups(layout(vpp=2))


def test_places_and_refusals() -> None:
    run_ranks(places_cover_the_layout, 4)
