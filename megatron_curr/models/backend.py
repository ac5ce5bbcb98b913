"""The one place that chooses which modules a model is built from.

Transformer Engine where it is installed, else NVIDIA Apex's fused norm, else our own. Documents are
isolated by our attention core only, so a recipe that isolates them gets it with every backend.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules

from megatron_curr.models.attention import CoreAttention
from megatron_curr.models.norms import ApexRMSNorm, LayerNorm, RMSNorm


@cache
def have_transformer_engine() -> bool:
    """Transformer Engine is installed, loads, and there is a device for it."""
    if not torch.cuda.is_available() or find_spec("transformer_engine") is None:
        return False
    try:
        import_module("transformer_engine.pytorch")
    except (ImportError, OSError):
        return False
    return True


@cache
def have_apex() -> bool:
    """NVIDIA's Apex with its compiled norms: the unrelated package of that name has none."""
    return torch.cuda.is_available() and find_spec("fused_layer_norm_cuda") is not None


def have_fused_weight_gradients() -> bool:
    """Apex's kernel that adds a weight's gradient into the fp32 buffer while computing it."""
    return torch.cuda.is_available() and find_spec("fused_weight_gradient_mlp_cuda") is not None


class Backend(LocalSpecProvider):
    """megatron-core's tensor-parallel linears with our norm and attention core."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """Our norms, or Apex's kernel for the RMS norm."""
        if not rms_norm:
            return LayerNorm
        return ApexRMSNorm if have_apex() else RMSNorm

    def core_attention(self) -> type:
        """Our core: context parallel, grouped queries, isolated documents."""
        return CoreAttention


def choose_backend(*, isolate_documents: bool) -> BackendSpecProvider:
    """The modules for this machine."""
    if not have_transformer_engine():
        return Backend()
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    class TransformerEngineBackend(TESpecProvider):
        """megatron-core's choice, save for the attention core of isolated documents."""

        def core_attention(self) -> type:
            return CoreAttention if isolate_documents else super().core_attention()

    return TransformerEngineBackend()


def experts_of(backend: BackendSpecProvider) -> tuple[type, MLPSubmodules | None]:
    """The module of a rank's routed experts: grouped where Transformer Engine can."""
    return backend.grouped_mlp_modules(have_transformer_engine(), False)


def describe_backend(
    *, isolate_documents: bool = False, has_experts: bool = False
) -> dict[str, str]:
    """Role to ``module.Class`` of every module the choice gives, for ``megatron-curr doctor``."""
    backend = choose_backend(isolate_documents=isolate_documents)
    roles: dict[str, type | None] = {
        "norm": backend.layer_norm(rms_norm=True),
        "query_key_norm": backend.layer_norm(rms_norm=True, for_qk=True),
        "column_parallel_linear": backend.column_parallel_linear(),
        "norm_and_linear": backend.column_parallel_layer_norm_linear(),
        "row_parallel_linear": backend.row_parallel_linear(),
        "core_attention": backend.core_attention(),
        "experts": experts_of(backend)[0] if has_experts else None,
    }
    return {
        role: f"{module.__module__}.{module.__qualname__}"
        for role, module in roles.items()
        if module
    }
