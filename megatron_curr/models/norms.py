"""Root-mean-square norms that keep their gradients right under sequence parallelism.

megatron-core's torch norm refuses sequence parallelism. Ours marks its weight, so that
``finalize_model_grads`` sums the gradient over the tensor axis: each rank saw a part of the tokens.
Norms of queries and keys see a part of the heads instead; they are found by name and summed there.

Legend: S sequence, B micro-batch, D hidden size (or N heads x H head dim for queries and keys).
"""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last dim, computed in fp32 (Zhang and Sennrich, 2019)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``."""
        return nn.functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(
            x.dtype
        )


class ApexRMSNorm(RMSNorm):
    """The same norm in NVIDIA Apex's fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``x`` [..., D]; the result has the dtype of ``x``."""
        from apex.normalization.fused_layer_norm import mixed_dtype_fused_rms_norm_affine

        return mixed_dtype_fused_rms_norm_affine(x, self.weight, self.weight.shape, self.eps)
