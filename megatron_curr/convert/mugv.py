"""The names of MUG-V's released transformer (``dit.pt``) for ours, tensor by tensor.

From the state dict of the release: 1,197 tensors for 56 layers. The text that stands in for none,
``y_embedder.y_embedding``, is not in it and nothing here reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from megatron_curr.convert.family import Piece, Rows
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.video_model import VideoDiT

_RENAMED = {
    "t_embedder": "timestep_embedder",
    "fps_embedder": "fps_embedder",
    "t_block": "timestep_block",
    "y_embedder.y_proj": "context_embedder.proj",
}


def mugv_pieces(model: VideoDiT) -> Iterator[Piece]:
    """Every tensor of the released model of this size, in the release's order."""
    hidden, volume = model.hidden_size, model.patch_volume
    for token in ("start_token", "end_token"):
        yield _same(token, token, hidden)
    kernel = (hidden, model.in_channels, *model.patch)
    yield from _linear("x_embedder.proj", "x_embedder.proj", *kernel)
    for name in ("t_embedder", "fps_embedder"):
        yield from _renamed_linear(f"{name}.mlp.0", hidden, model.timestep_frequencies)
        yield from _renamed_linear(f"{name}.mlp.2", hidden, hidden)
    yield from _renamed_linear("t_block.1", 6 * hidden, hidden)
    yield from _renamed_linear("y_embedder.y_proj.fc1", hidden, model.text_hidden_size)
    yield from _renamed_linear("y_embedder.y_proj.fc2", hidden, hidden)
    for layer in range(model.num_layers):
        yield from _layer(model, f"blocks.{layer}", f"decoder.layers.{layer}")
    table = "final_layer.scale_shift_table"
    yield _same(table, f"{table}.bias", 2, hidden)
    out = "final_layer.linear"
    yield from _linear(out, out, volume * model.out_channels, hidden)


def model_of_shapes(shapes: Mapping[str, Sequence[int]]) -> VideoDiT:
    """The model whose released weights have these shapes. Raises ``CheckpointError``.

    What no shape tells (text tokens, the base of rotations, epsilon, rounded timesteps) is the
    release's.
    """
    try:
        hidden, in_channels, *patch = shapes["x_embedder.proj.weight"]
        channels = shapes["blocks.0.attn.q_norm.weight"][0]
        layers = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
        volume = patch[0] * patch[1] * patch[2]
        return VideoDiT(
            num_layers=len(layers),
            hidden_size=hidden,
            ffn_hidden_size=shapes["blocks.0.mlp.fc1.weight"][0],
            num_attention_heads=shapes["blocks.0.attn.proj.weight"][1] // channels,
            kv_channels=channels,
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0] // volume,
            patch=patch,
            text_hidden_size=shapes["y_embedder.y_proj.fc1.weight"][1],
            timestep_frequencies=shapes["t_embedder.mlp.0.weight"][1],
            round_timesteps=True,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"no state dict of MUG-V's transformer: {error}") from error


def _layer(model: VideoDiT, theirs: str, ours: str) -> Iterator[Piece]:
    hidden, ffn, channels = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    width = model.num_attention_heads * channels
    yield _same(f"{theirs}.scale_shift_table", f"{ours}.scale_shift_table.bias", 6, hidden)
    attention = f"{theirs}.attn", f"{ours}.self_attention"
    yield from _fused(f"{attention[0]}.qkv", f"{attention[1]}.linear_qkv", 3, model)
    yield from _norms_and_projection(*attention, channels, width, hidden)
    norm = f"{theirs}.cross_attn_norm", f"{ours}.pre_cross_attn_layernorm"
    yield from _linear(*norm, hidden)
    attention = f"{theirs}.cross_attn", f"{ours}.cross_attention"
    yield from _linear(f"{attention[0]}.q_linear", f"{attention[1]}.linear_q", width, hidden)
    yield from _fused(f"{attention[0]}.kv_linear", f"{attention[1]}.linear_kv", 2, model)
    yield from _norms_and_projection(*attention, channels, width, hidden)
    yield from _linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.linear_fc1", ffn, hidden)
    yield from _linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.linear_fc2", hidden, ffn)


def _norms_and_projection(
    theirs: str, ours: str, channels: int, width: int, hidden: int
) -> Iterator[Piece]:
    for letter in "qk":
        norm = f"{theirs}.{letter}_norm.weight", f"{ours}.{letter}_layernorm.weight"
        yield _same(*norm, channels)
    yield from _linear(f"{theirs}.proj", f"{ours}.linear_proj", hidden, width)


def _fused(theirs: str, ours: str, parts: int, model: VideoDiT) -> Iterator[Piece]:
    """A projection to queries, keys, values: theirs all heads of each part, ours part by head."""
    heads, channels = model.num_attention_heads, model.kv_channels
    blocks = (head * parts + part for part in range(parts) for head in range(heads))
    rows = tuple((block * channels, (block + 1) * channels) for block in blocks)
    height = parts * heads * channels
    weight, bias = f"{theirs}.weight", f"{theirs}.bias"
    yield Piece(weight, (height, model.hidden_size), f"{ours}.weight", rows)
    yield Piece(bias, (height,), f"{ours}.bias", rows)


def _renamed_linear(theirs: str, *shape: int) -> Iterator[Piece]:
    old = next(name for name in _RENAMED if theirs.startswith(f"{name}."))
    yield from _linear(theirs, theirs.replace(old, _RENAMED[old], 1), *shape)


def _linear(theirs: str, ours: str, *shape: int) -> Iterator[Piece]:
    """Weight and bias."""
    yield _same(f"{theirs}.weight", f"{ours}.weight", *shape)
    yield _same(f"{theirs}.bias", f"{ours}.bias", shape[0])


def _same(theirs: str, ours: str, *shape: int) -> Piece:
    rows: Rows = ((0, shape[0]),)
    return Piece(theirs, shape, ours, rows)
