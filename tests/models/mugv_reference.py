"""MUG-V's transformer in plain torch, one sample at a time, from the facts of the release.

Independent of the package: weights go by the names of the released state dict, rotations are
complex numbers, there is no batch, no padding, no split and no mask but the frames'.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
EPS = 1e-6
TURNED_TABLES = (480, 384)  # frames; rows and columns


def velocity(
    weights: Weights,
    latent: Tensor,
    text: Tensor,
    *,
    timestep: float,
    fps: float,
    noised: list[bool],
    num_heads: int,
    blocks: list[Tensor] | None = None,
) -> Tensor:
    """[48, T, H, W] for ``latent`` [24, T, H, W] and ``text`` [L, 4096] without padding.

    ``noised`` tells the frames that are at ``timestep`` from the clean ones. What leaves each block
    is appended to ``blocks``.
    """
    width = weights["start_token"].shape[0]
    num_layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    _, frames, height, breadth = latent.shape
    rows, columns = math.ceil(height / 2), math.ceil(breadth / 2)
    x = patches(weights, latent)
    x = torch.cat([weights["start_token"][None], x, weights["end_token"][None]])
    is_noised = torch.tensor(
        [False, *(flag for flag in noised for _ in range(rows * columns)), False]
    )[:, None]

    speed = embed_number(weights, "fps_embedder", fps)
    t = embed_number(weights, "t_embedder", timestep) + speed
    t0 = embed_number(weights, "t_embedder", 0.0) + speed
    six = linear(weights, "t_block.1", torch.nn.functional.silu(t)).reshape(6, width)
    six0 = linear(weights, "t_block.1", torch.nn.functional.silu(t0)).reshape(6, width)
    y = embed_text(weights, text)
    turns = rotations(frames, rows, columns, width // num_heads)

    for layer in range(num_layers):
        x = block(
            weights, f"blocks.{layer}", x, y, six, six0, is_noised, turns, num_heads=num_heads
        )
        if blocks is not None:
            blocks.append(x)

    x, is_noised = x[1:-1], is_noised[1:-1]
    table = weights["final_layer.scale_shift_table"]
    shift, scale = (torch.where(is_noised, table[i] + t, table[i] + t0) for i in range(2))
    x = linear(weights, "final_layer.linear", norm(x) * (1 + scale) + shift)
    x = x.reshape(frames, rows, columns, 1, 2, 2, -1)
    x = torch.einsum("thwpqrc->ctphqwr", x)
    return x.reshape(-1, frames, rows * 2, columns * 2)[:, :, :height, :breadth]


def block(
    weights: Weights,
    name: str,
    x: Tensor,
    y: Tensor,
    six: Tensor,
    six0: Tensor,
    is_noised: Tensor,
    turns: Tensor,
    *,
    num_heads: int,
) -> Tensor:
    """One layer over ``x`` [S, D] and text ``y`` [L, D]."""
    table = weights[f"{name}.scale_shift_table"]
    chosen = [torch.where(is_noised, table[i] + six[i], table[i] + six0[i]) for i in range(6)]
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = chosen

    h = norm(x) * (1 + scale_msa) + shift_msa
    qkv = linear(weights, f"{name}.attn.qkv", h).reshape(len(x), 3, num_heads, -1)
    q, k, v = qkv.unbind(1)
    q = turn(rms(q, weights[f"{name}.attn.q_norm.weight"]), turns)
    k = turn(rms(k, weights[f"{name}.attn.k_norm.weight"]), turns)
    x = x + gate_msa * linear(weights, f"{name}.attn.proj", softmax_attention(q, k, v))

    h = (
        norm(x) * weights[f"{name}.cross_attn_norm.weight"]
        + weights[f"{name}.cross_attn_norm.bias"]
    )
    q = linear(weights, f"{name}.cross_attn.q_linear", h).reshape(len(x), num_heads, -1)
    kv = linear(weights, f"{name}.cross_attn.kv_linear", y).reshape(len(y), 2, num_heads, -1)
    k, v = kv.unbind(1)
    q = rms(q, weights[f"{name}.cross_attn.q_norm.weight"])
    k = rms(k, weights[f"{name}.cross_attn.k_norm.weight"])
    x = x + linear(weights, f"{name}.cross_attn.proj", softmax_attention(q, k, v))

    h = norm(x) * (1 + scale_mlp) + shift_mlp
    h = gelu_tanh(linear(weights, f"{name}.mlp.fc1", h))
    return x + gate_mlp * linear(weights, f"{name}.mlp.fc2", h)


def patches(weights: Weights, latent: Tensor) -> Tensor:
    """[patches, D], frame by frame and row by row."""
    _, _, height, breadth = latent.shape
    filled = torch.nn.functional.pad(latent, [0, breadth % 2, 0, height % 2])
    x = torch.nn.functional.conv3d(
        filled[None],
        weights["x_embedder.proj.weight"],
        weights["x_embedder.proj.bias"],
        stride=(1, 2, 2),
    )
    return x[0].flatten(1).T


def embed_number(weights: Weights, name: str, value: float) -> Tensor:
    """[D] of a timestep or a frame rate."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    angles = torch.tensor(value, dtype=torch.float32) * frequencies
    waves = torch.cat([angles.cos(), angles.sin()]).to(weights["start_token"].dtype)
    x = torch.nn.functional.silu(linear(weights, f"{name}.mlp.0", waves))
    return linear(weights, f"{name}.mlp.2", x)


def embed_text(weights: Weights, text: Tensor) -> Tensor:
    """[L, D]."""
    x = gelu_tanh(linear(weights, "y_embedder.y_proj.fc1", norm(text)))
    return norm(linear(weights, "y_embedder.y_proj.fc2", x))


def rotations(frames: int, rows: int, columns: int, head_dim: int) -> Tensor:
    """A complex number for each place and pair of channels, [S, head_dim / 2]."""
    pairs = head_dim // 6
    exponents = torch.arange(pairs, dtype=torch.float64) * -6 / head_dim
    frequencies = 10000.0**exponents
    in_time, in_space = (
        torch.polar(torch.ones(count, pairs).double(), torch.arange(count)[:, None] * frequencies)
        for count in TURNED_TABLES
    )
    places = [(0, 0, 0)]
    places += [
        (row, column, frame + 1)
        for frame in range(frames)
        for row in range(rows)
        for column in range(columns)
    ]
    places += [(rows - 1, columns - 1, frames + 1)]
    return torch.stack(
        [
            torch.cat([in_space[row], in_space[column], in_time[min(frame, 479)]])
            for row, column, frame in places
        ]
    )


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring channels of [S, heads, head_dim] as complex numbers, turned."""
    pairs = torch.view_as_complex(x.double().reshape(*x.shape[:2], -1, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(2).to(x.dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[S, heads * head_dim]."""
    scores = torch.einsum("shd,lhd->hsl", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("hsl,lhd->shd", scores.softmax(-1), v).flatten(1)


def linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
