"""How the keys and values of all context-parallel ranks reach the queries of one rank.

A carrier brings every rank's block in turn, and takes the gradient of each block back to the rank
that owns it. ``RingCarrier`` passes blocks from rank to rank (ring attention: Liu, Zaharia and
Abbeel 2023, arXiv:2310.01889); ``GatherCarrier`` holds all of them at once (Llama 3: Grattafiori
et al. 2024, arXiv:2407.21783, section 3.3.2); ``LocalCarrier`` has the one block of a whole
sequence. A carrier serves one pass, forward or backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Carrier(Protocol):
    """Moves blocks of one shape. Every method that communicates is collective over ``group``."""

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank it comes from, block) of every rank, this one's first.

        A block is valid until the next is asked for.
        """
        ...

    def room(self, source: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The sum so far of the gradient of the block that ``blocks`` gave last, to add to.

        Waits for it where it comes from another rank. The same at every call for a block.
        """
        ...

    def give(self, source: int) -> None:
        """Send on that sum; ``room`` was asked for it before."""
        ...

    def collect(self) -> Tensor:
        """The gradient of this rank's own block, summed over all ranks; after the last block."""
        ...


class LocalCarrier:
    """One rank, one block."""

    def __init__(self) -> None:
        self._gradient: Tensor | None = None

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        yield 0, own

    def room(self, source: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        if self._gradient is None:
            self._gradient = _zeros(like, dtype)
        return self._gradient

    def give(self, source: int) -> None:
        """Nothing: it is the rank's own."""

    def collect(self) -> Tensor:
        assert self._gradient is not None
        return self._gradient


class GatherCarrier:
    """All blocks by one all-gather; their gradients by one reduce-scatter."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._gradients: Tensor | None = None

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        size, rank = self._group.size(), self._group.rank()
        by_rank = own.new_empty((size, *own.shape))
        dist.all_gather_into_tensor(by_rank.flatten(0, 1), own.contiguous(), group=self._group)
        for step in range(size):
            source = (rank - step) % size
            yield source, by_rank[source]

    def room(self, source: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        if self._gradients is None:
            shape = (self._group.size(), *like.shape)
            self._gradients = like.new_zeros(shape, dtype=dtype)
        return self._gradients[source]

    def give(self, source: int) -> None:
        """Nothing: all sums are sent together."""

    def collect(self) -> Tensor:
        assert self._gradients is not None
        own = torch.empty_like(self._gradients[0])
        dist.reduce_scatter_tensor(own, self._gradients.flatten(0, 1), group=self._group)
        return own


class RingCarrier:
    """Blocks travel from each rank to the next, while the block before is worked on.

    A rank holds one block and receives another into a second buffer: two buffers a pass, whatever
    the size of the ring. Going back the gradient of a block follows it a step behind, gathering
    every rank's share, and the last hop brings it home.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size, self._rank = group.size(), group.rank()
        self._own_gradient: Tensor | None = None
        self._gradient: Tensor | None = None  # of the block held now
        self._spare_gradient: Tensor | None = None
        self._gradient_buffers: list[Tensor] = []  # under way: sent to the next rank, received
        self._gradient_works: list[dist.Work] = []

    def blocks(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        held = own.contiguous()
        coming = torch.empty_like(held)
        for step in range(self._size):
            is_last = step == self._size - 1
            works = [] if is_last else self._pass_on(held, coming)
            yield (self._rank - step) % self._size, held
            for work in works:
                work.wait()
            # The first buffer may be the caller's: never receive into it.
            spare = torch.empty_like(held) if step == 0 and self._size > 2 else held
            held, coming = coming, spare

    def room(self, source: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        if self._gradient is None:
            sent_and_received = self._gradient_under_way()
            self._gradient = sent_and_received[1] if sent_and_received else _zeros(like, dtype)
            self._spare_gradient = sent_and_received[0] if sent_and_received else None
        return self._gradient

    def give(self, source: int) -> None:
        assert self._gradient is not None
        gradient, self._gradient = self._gradient, None
        if source == self._rank:
            self._own_gradient = gradient
            return
        spare = self._spare_gradient
        incoming = torch.empty_like(gradient) if spare is None else spare
        self._gradient_buffers = [gradient, incoming]
        self._gradient_works = self._pass_on(gradient, incoming)

    def collect(self) -> Tensor:
        assert self._own_gradient is not None
        if sent_and_received := self._gradient_under_way():
            self._own_gradient += sent_and_received[1]
        return self._own_gradient

    def _gradient_under_way(self) -> list[Tensor]:
        """Wait for it: the buffer that is free now, and the one that has arrived; or nothing."""
        for work in self._gradient_works:
            work.wait()
        buffers, self._gradient_buffers, self._gradient_works = self._gradient_buffers, [], []
        return buffers

    def _pass_on(self, outgoing: Tensor, incoming: Tensor) -> list[dist.Work]:
        """Start to send to the next rank and to receive from the one before.

        Between two ranks messages arrive in the order they are started in, which is the same on
        every rank: block, gradient, block, gradient.
        """
        group = self._group
        after = dist.get_global_rank(group, (self._rank + 1) % self._size)
        before = dist.get_global_rank(group, (self._rank - 1) % self._size)
        return dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, outgoing, after, group),
                dist.P2POp(dist.irecv, incoming, before, group),
            ]
        )


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
