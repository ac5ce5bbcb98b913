from __future__ import annotations

import torch

from megatron_curr.models.gpt import transformer_config
from megatron_curr.models.norms import RMSNorm
from tests.parallel.layouts import layout, tiny_model


def test_norm_is_computed_in_fp32_and_marked_for_sequence_parallel() -> None:
    config = transformer_config(
        tiny_model(), parallel=layout(tp=2, sequence_parallel=True), precision="bf16"
    )
    norm = RMSNorm(config, 64, eps=1e-6)
    assert norm.weight.sequence_parallel
    x = torch.randn(5, 2, 64, dtype=torch.bfloat16) * 100
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    assert norm(x).dtype is torch.bfloat16
    assert torch.equal(norm(x), expected.bfloat16())


def test_norm_is_not_marked_on_one_rank() -> None:
    config = transformer_config(tiny_model(), parallel=layout(), precision="fp32")
    assert not RMSNorm(config, 64).weight.sequence_parallel
