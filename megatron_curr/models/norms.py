"""Norms that keep their gradients right under sequence parallelism.

megatron-core's torch norm refuses sequence parallelism. Ours marks its weight, so that
``finalize_model_grads`` sums the gradient over the tensor axis: each rank saw a part of the tokens.
Norms of queries and keys see a part of the heads instead; they are found by name and summed there.

Legend: S sequence, B micro-batch, D hidden size, N heads (of queries or keys), H head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn


def upcast(x: Tensor) -> Tensor:
    """In fp32 where it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gain_of(weight: Tensor, config: TransformerConfig) -> Tensor:
    """What a norm multiplies by, in fp32."""
    return upcast(weight) + 1 if config.layernorm_zero_centered_gamma else upcast(weight)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, computed in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``."""
        gain = gain_of(self.weight, self.config)
        return nn.functional.rms_norm(upcast(x), (x.shape[-1],), gain, self.eps).to(x.dtype)


class ApexRMSNorm(RMSNorm):
    """The same norm in NVIDIA Apex's fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``."""
        from apex.normalization.fused_layer_norm import mixed_dtype_fused_rms_norm_affine

        weight = self.weight
        if self.config.layernorm_zero_centered_gamma:
            weight = gain_of(weight, self.config)
        return mixed_dtype_fused_rms_norm_affine(x, weight, weight.shape, self.eps)


class LayerNorm(nn.Module):
    """``(x - mean) / std * weight + bias`` over the last dim, computed in fp32."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        device, dtype = torch.cuda.current_device(), config.params_dtype
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=dtype, device=device))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``."""
        gain = gain_of(self.weight, self.config)
        return nn.functional.layer_norm(
            upcast(x), (x.shape[-1],), gain, upcast(self.bias), self.eps
        ).to(x.dtype)


class LayerNormWithoutBias(nn.Module):
    """``(x - mean) / std * weight`` over the last dim, computed in fp32 (Cohere)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.config, self.eps = config, eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``."""
        gain = gain_of(self.weight, self.config)
        return nn.functional.layer_norm(upcast(x), (x.shape[-1],), gain, eps=self.eps).to(x.dtype)


class ProjectionNorm(nn.Module):
    """RMS norm of all heads of a token together (OLMo 2), each tensor rank with its heads.

    The mean square is summed over the tensor ranks, and so is its gradient: every rank's output
    depends on it. The weight is cut like the heads.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, num_heads: int, eps: float = 1e-5
    ) -> None:
        """``hidden_size`` is the head dim, as attention counts it."""
        super().__init__()
        self.eps = eps
        self.num_ranks = config.tensor_model_parallel_size
        self.width = num_heads * hidden_size
        self.weight = nn.Parameter(
            torch.ones(
                self.width // self.num_ranks,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SBNH: Tensor) -> Tensor:
        """Normalise over N and H; the result has shape and dtype of ``x_SBNH``."""
        wide = x_SBNH.flatten(2).float()
        total = wide.square().sum(dim=-1, keepdim=True)
        if self.num_ranks > 1:
            total = reduce_from_tensor_model_parallel_region(total)
            total = copy_to_tensor_model_parallel_region(total)
        wide = wide * torch.rsqrt(total / self.width + self.eps) * self.weight.float()
        return wide.to(x_SBNH.dtype).view_as(x_SBNH)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The weight, cut along its one dim."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
