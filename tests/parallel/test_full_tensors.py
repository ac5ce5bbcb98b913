from __future__ import annotations

import pytest
import torch

from megatron_curr.parallel.full_tensors import Cut


@pytest.mark.parametrize(
    "cut", [Cut(dim=None), Cut(dim=0), Cut(dim=1), Cut(dim=0, stride=2)], ids=str
)
def test_parts_join_to_the_full_tensor(cut: Cut) -> None:
    full = torch.arange(16 * 8).view(16, 8)
    parts = [cut.part(full, rank=rank, size=4) for rank in range(4)]
    assert torch.equal(cut.join(parts), full)
    assert cut.full_shape(parts[0].shape, 4) == tuple(full.shape)


def test_stacked_gate_and_up_rows_are_cut_apart() -> None:
    gate_up = torch.arange(8).view(8, 1)
    part = Cut(dim=0, stride=2).part(gate_up, rank=1, size=2)
    assert part.flatten().tolist() == [2, 3, 6, 7]
