"""Arithmetic of a model in closed form: what training one token needs, on any hardware.

A matrix product of a token with a weight matrix takes 2 FLOPs a weight forwards and 4 backwards
(input and weight gradient). Attention takes 2 FLOPs for each multiplication of a query with a key
and of a score with a value, forwards, and twice that backwards. Lookups, norms, activation
functions and softmax are left out (well under 1 %), and so is recomputation, which is work of the
layout and not of the model. Sources: Kaplan et al. 2020, arXiv:2001.08361, table 1; Narayanan et
al. 2021, arXiv:2104.04473, appendix; Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, appendix B.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from megatron_curr.plan.model_size import (
    active_size,
    layer_weights,
    score_width,
)
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel

Ints = NDArray[np.int64]

BACKWARD = 2  # the backward pass, in forward passes


def causal_keys(seq_length: int) -> float:
    """Keys that a token of a window sees on average when it sees itself and all before it."""
    return (seq_length + 1) / 2


def keys_in_window(window: int, seq_length: int) -> float:
    """Keys that a token sees on average where it sees ``window`` of them, its own included."""
    window = min(window, seq_length)
    return window - window * (window - 1) / (2 * seq_length)


def keys_of_layer(model: Model, layer: int, *, keys_per_token: float, seq_length: int) -> float:
    """Keys that a token sees on average in one layer, which may have a window."""
    if not model.windowed_layers[layer]:
        return keys_per_token
    assert model.window_size is not None
    return min(keys_per_token, keys_in_window(model.window_size, seq_length))


def keys_in_documents(document_tokens: Ints, seq_length: int) -> float:
    """Keys that a token sees on average where attention stays inside documents.

    ``document_tokens`` [num_documents] are lengths; windows cut the stream of documents at random
    places. The token at place ``j`` of its document, in a window that begins at any of
    ``seq_length`` places before it, sees ``min(j, u) + 1`` keys, ``u`` uniform in [0, seq_length).
    """
    length = document_tokens.astype(np.float64)
    inside = np.minimum(length, seq_length)
    # The sum over j < inside of E[min(j, u)] = (j seq_length - j (j + 1) / 2) / seq_length.
    seen = inside * (inside - 1) / 2 - (inside - 1) * inside * (inside + 1) / (6 * seq_length)
    seen += (length - inside) * (seq_length - 1) / 2
    return float(seen.sum() / length.sum()) + 1


def layer_flops_per_token(model: Model, *, has_experts: bool, keys_per_token: float) -> float:
    """Forward FLOPs of one token in one layer; of experts only those the token is sent to."""
    matrices = sum(
        active_size(weight, model)
        for weight in layer_weights(model, has_experts=has_experts)
        if weight.inputs is not None
    )
    return 2 * matrices + 2 * score_width(model) * keys_per_token


def output_flops_per_token(model: Model, *, vocab_size: int) -> float:
    """Forward FLOPs of one token in the output layer, tied or not."""
    return 2 * vocab_size * model.hidden_size


def recomputed_flops_per_token(
    model: Model,
    parallel: Parallel,
    *,
    place_in_chunk: int,
    has_experts: bool,
    keys_per_token: float,
) -> float:
    """FLOPs that recomputing a layer adds for one token; its place decides for ``block``."""
    if parallel.recompute_granularity == "full":
        kept = parallel.recompute_method == "block"
        if kept and place_in_chunk >= (parallel.recompute_num_layers or 1):
            return 0.0
        return layer_flops_per_token(model, has_experts=has_experts, keys_per_token=keys_per_token)
    if parallel.recompute_granularity is None:
        return 0.0
    modules = parallel.recompute_modules or ["core_attn"]
    total = 2 * score_width(model) * keys_per_token if "core_attn" in modules else 0.0
    for weight in layer_weights(model, has_experts=has_experts):
        module = weight.name.rpartition("_fc")[0] or weight.name
        owners = {"mlp": ("mlp",), "shared_experts": ("shared_experts", "moe")}
        chosen = set(owners.get(module, ("moe",) if module in ("router", "experts") else ()))
        if weight.inputs is not None and chosen & set(modules):
            total += 2 * active_size(weight, model)
    return total


def model_flops_per_token(
    model: Model, *, vocab_size: int, seq_length: int, keys_per_token: float | None = None
) -> float:
    """FLOPs that training one token needs, forwards and backwards, at this sequence length.

    ``keys_per_token`` is the mean number of keys that a query meets. Its default is that of a
    causal mask, which kernels skip the other half of. Give ``seq_length`` for the convention of
    PaLM's appendix, which counts masked scores as well, and the mean of isolated documents
    (``keys_in_documents``) where attention stays inside them.
    """
    keys = causal_keys(seq_length) if keys_per_token is None else keys_per_token
    forward = output_flops_per_token(model, vocab_size=vocab_size)
    alike = Counter(zip(model.moe_layers, model.windowed_layers, strict=True))
    for (has_experts, is_windowed), count in alike.items():
        layer = model.windowed_layers.index(is_windowed)
        seen = keys_of_layer(model, layer, keys_per_token=keys, seq_length=seq_length)
        forward += count * layer_flops_per_token(
            model, has_experts=has_experts, keys_per_token=seen
        )
    return (1 + BACKWARD) * forward
