"""The CPU stand-ins leave other libraries' device contexts alone."""

from __future__ import annotations

import torch

import megatron_curr.parallel  # noqa: F401  (puts the stand-ins in place)


def test_a_device_context_still_redirects_factories() -> None:
    with torch.device("meta"):
        made = [torch.empty(1), torch.zeros(1), torch.tensor([1.0]), torch.arange(3)]
    assert [tensor.device.type for tensor in made] == ["meta"] * 4
