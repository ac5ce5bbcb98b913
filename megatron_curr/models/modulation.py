"""Norms shifted and scaled, and branches gated, by the timestep: adaLN with one table a layer.

A sample has two sets of numbers: one of its timestep, one of timestep 0 for frames that are given
clean. Each token takes one of the two. Held for every token the numbers would be six times the
hidden states, so they stay two rows a sample, here and in what is kept for the backward pass.

Legend: S tokens of this rank, B micro-batch, D hidden size, R the two rows (``NOISED``, ``CLEAN``),
N numbers of a table.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatron_curr.models.norms import upcast

NOISED, CLEAN = 0, 1


class ScaleShiftTable(nn.Module):
    """Learned offsets [N, D] of the numbers that come from the timestep."""

    def __init__(self, config: TransformerConfig, num_rows: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(
            torch.empty(
                num_rows,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        self.bias.sequence_parallel = config.sequence_parallel

    def forward(self, numbers: Tensor) -> tuple[Tensor, ...]:
        """N tensors [R, B, D] of ``numbers`` [R, B, N or 1, D], in fp32 (or fp64, if they are)."""
        return (upcast(numbers) + upcast(self.bias)).unbind(2)


def modulated_norm(
    hidden_SBD: Tensor, *, shift_RBD: Tensor, scale_RBD: Tensor, noised_SB: Tensor, eps: float
) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` with each token's row; the norm has no weights."""
    normed_SBD = nn.functional.layer_norm(hidden_SBD, hidden_SBD.shape[-1:], eps=eps)
    return _Modulate.apply(normed_SBD, shift_RBD, scale_RBD, noised_SB)


def gated_sum(
    hidden_SBD: Tensor, branch_SBD: Tensor, *, gate_RBD: Tensor, noised_SB: Tensor
) -> Tensor:
    """``hidden + gate * branch`` with each token's row."""
    return _GatedSum.apply(hidden_SBD, branch_SBD, gate_RBD, noised_SB)


def sinusoids(values_B: Tensor, width: int) -> Tensor:
    """Cosines, then sines, of the values at frequencies from 1 down to 1/10000, [B, width], fp32.

    Those of Vaswani et al. 2017, arXiv:1706.03762, cosines first.
    """
    half = width // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values_B.device) / half
    angles = values_B.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _chosen(rows_RBD: Tensor, noised_SB1: Tensor) -> Tensor:
    return torch.where(noised_SB1, rows_RBD[NOISED], rows_RBD[CLEAN])


def _summed(x_SBD: Tensor, noised_SB1: Tensor) -> Tensor:
    """Sums over the tokens of either row, [R, B, D]; inverse of ``_chosen`` for gradients."""
    x_SBD = upcast(x_SBD)
    return torch.stack(
        [x_SBD.masked_fill(~noised_SB1, 0).sum(0), x_SBD.masked_fill(noised_SB1, 0).sum(0)]
    )


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SBD: Tensor, shift_RBD: Tensor, scale_RBD: Tensor, noised_SB: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_SBD, scale_RBD, noised_SB)
        noised_SB1 = noised_SB[..., None]
        scaled_SBD = upcast(x_SBD) * _chosen(1 + scale_RBD, noised_SB1)
        return (scaled_SBD + _chosen(shift_RBD, noised_SB1)).to(x_SBD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBD: Tensor) -> tuple[Tensor | None, ...]:
        x_SBD, scale_RBD, noised_SB = ctx.saved_tensors
        noised_SB1 = noised_SB[..., None]
        grad_x_SBD = upcast(grad_SBD) * _chosen(1 + scale_RBD, noised_SB1)
        return (
            grad_x_SBD.to(x_SBD.dtype),
            _summed(grad_SBD, noised_SB1),
            _summed(upcast(grad_SBD) * x_SBD, noised_SB1),
            None,
        )


class _GatedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_SBD: Tensor, branch_SBD: Tensor, gate_RBD: Tensor, noised_SB: Tensor
    ) -> Tensor:
        ctx.save_for_backward(branch_SBD, gate_RBD, noised_SB)
        gated_SBD = upcast(branch_SBD) * _chosen(gate_RBD, noised_SB[..., None])
        return (upcast(x_SBD) + gated_SBD).to(x_SBD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SBD: Tensor) -> tuple[Tensor | None, ...]:
        branch_SBD, gate_RBD, noised_SB = ctx.saved_tensors
        noised_SB1 = noised_SB[..., None]
        grad_branch_SBD = upcast(grad_SBD) * _chosen(gate_RBD, noised_SB1)
        return (
            grad_SBD,
            grad_branch_SBD.to(branch_SBD.dtype),
            _summed(upcast(grad_SBD) * branch_SBD, noised_SB1),
            None,
        )
