"""Which exchange context-parallel attention uses, and the process groups it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch.distributed as dist

from megatron_curr.recipe.parallel import ContextParallelExchange


@dataclass(frozen=True, slots=True)
class ContextExchange:
    """An all-to-all over heads on one group, then blocks carried over another; either may be None.

    The all-to-all group, where there is one, is made of neighbours: their parts of the sequence
    join to what one rank of a smaller context axis would hold, the axis of the blocks group.
    """

    all_to_all_group: dist.ProcessGroup | None
    blocks_group: dist.ProcessGroup | None
    gathers_blocks: bool
    """Blocks are gathered all at once; else they go round the ring."""

    @property
    def blocks_rank(self) -> int:
        return self.blocks_group.rank() if self.blocks_group else 0

    @property
    def blocks_size(self) -> int:
        return self.blocks_group.size() if self.blocks_group else 1

    @property
    def all_to_all_size(self) -> int:
        return self.all_to_all_group.size() if self.all_to_all_group else 1


def build_exchange(
    kind: ContextParallelExchange,
    cp_group: dist.ProcessGroup,
    *,
    hierarchical_groups: list[dist.ProcessGroup] | None = None,
) -> ContextExchange:
    """The exchange of that name over ``cp_group``; ``a2a+p2p`` needs the groups of its levels."""
    if kind == "a2a":
        return ContextExchange(cp_group, None, False)
    if kind == "a2a+p2p":
        assert hierarchical_groups is not None and len(hierarchical_groups) == 2
        all_to_all_group, ring_group = hierarchical_groups
        return ContextExchange(all_to_all_group, ring_group, False)
    return ContextExchange(None, cp_group, kind == "all_gather")


@cache
def build_hierarchical_groups(
    cp_group: dist.ProcessGroup, sizes: tuple[int, int]
) -> list[dist.ProcessGroup]:
    """This rank's all-to-all group, of neighbours, and ring group, across them.

    The same ranks as megatron-core's hierarchical context-parallel groups of ``sizes``. Collective
    over ``cp_group`` alone, so a rank needs not know of the others.
    """
    all_to_all_size, ring_size = sizes
    assert all_to_all_size * ring_size == cp_group.size()
    ranks = dist.get_process_group_ranks(cp_group)
    rank = cp_group.rank()
    first, place = rank - rank % all_to_all_size, rank % all_to_all_size
    return [
        dist.new_group(members, use_local_synchronization=True)
        for members in (ranks[first : first + all_to_all_size], ranks[place::all_to_all_size])
    ]
