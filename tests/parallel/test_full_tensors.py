from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_curr.parallel.full_tensors import Cut, named_full_parameters


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


class GroupedLinear(nn.Module):
    """As Transformer Engine holds experts: one module, a weight for each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight0, self.weight1 = (nn.Parameter(torch.zeros(1)) for _ in range(2))


@pytest.mark.parametrize("grouped", [False, True])
def test_experts_are_named_by_their_place_among_all(grouped: bool) -> None:
    experts = nn.Module()
    if grouped:
        experts.linear_fc1 = GroupedLinear()
    else:
        experts.local_experts = nn.ModuleList(nn.Module() for _ in range(2))
        for expert in experts.local_experts:
            expert.linear_fc1 = nn.Linear(1, 1, bias=False)
    layer = nn.Module()
    layer.layer_number = 4
    layer.mlp = nn.Module()
    layer.mlp.experts = experts
    layer.mlp.local_expert_indices = [6, 7]
    stage = nn.Module()
    stage.share_embeddings_and_output_weights = False
    stage.decoder = nn.Module()
    stage.decoder.layers = nn.ModuleList([layer])
    assert [name for name, _ in named_full_parameters(stage)] == [
        f"decoder.layers.3.mlp.experts.local_experts.{expert}.linear_fc1.weight"
        for expert in (6, 7)
    ]
