"""Checkpoints of MUG-V's own training code: megatron-core's ``torch_dist``, without a recipe.

Its tensors have the names of ours (Shopee-MUG/MUG-V-Megatron-LM-Training). What no tensor's shape
tells is the release's. ``context_embedder.drop_emb`` is a constant, as it is in the release.
"""

from __future__ import annotations

from pathlib import Path

from megatron_curr.convert.mugv import model_of_shapes
from megatron_curr.convert.source import Which, open_weights
from megatron_curr.convert.stored import METADATA, StoredTensors, open_stored
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.video_model import VideoDiT

TRACKER = "latest_checkpointed_iteration.txt"
_CONSTANT = "context_embedder.drop_emb"
_OF_A_LAYER = "self_attention.q_layernorm.weight"
# Enough of the release's names to tell every size, and where their tensors are stored.
_TELLING = {
    "x_embedder.proj.weight": "x_embedder.proj.weight",
    "blocks.0.mlp.fc1.weight": "decoder.layers.0.mlp.linear_fc1.weight",
    "blocks.0.attn.proj.weight": "decoder.layers.0.self_attention.linear_proj.weight",
    "final_layer.linear.weight": "final_layer.linear.weight",
    "y_embedder.y_proj.fc1.weight": "context_embedder.proj.fc1.weight",
    "t_embedder.mlp.0.weight": "timestep_embedder.mlp.0.weight",
}


def find_training_checkpoint(path: Path) -> Path | None:
    """The checkpoint that ``path`` is, or whose folder it is; None where a recipe lies beside it.

    Raises ``CheckpointError`` where the folder's tracker names one that is not there.
    """
    if (path / TRACKER).is_file():
        newest = (path / TRACKER).read_text(encoding="utf-8", errors="replace").strip()
        folder = path / (f"iter_{int(newest):07d}" if newest.isdecimal() else newest)
        if not (folder / METADATA).is_file():
            raise CheckpointError(
                f"{path / TRACKER}: names {newest!r}, and {folder} is no torch_dist checkpoint; "
                "give the folder of one"
            )
        return folder
    if not (path / METADATA).is_file() or (path.resolve().parent.parent / "recipe.yaml").is_file():
        return None
    return path


def holds_video(checkpoint: Path) -> bool:
    """Whether its weights are of a video transformer."""
    return "x_embedder.proj.weight" in open_stored(checkpoint)


def open_training_checkpoint(checkpoint: Path, which: Which) -> tuple[StoredTensors, VideoDiT]:
    """Its weights, or their average, and the model they are of. Raises ``CheckpointError``."""
    weights = open_weights(checkpoint, which)
    weights.tensors.pop(_CONSTANT, None)
    alike = weights.tensors.get(f"decoder.layers.{_OF_A_LAYER}")
    if alike is not None:
        layers = range(alike.shape[0])
    else:
        layers = range(sum(name.endswith(f".{_OF_A_LAYER}") for name in weights.tensors))
    told = {theirs: weights.shape(ours) for theirs, ours in _TELLING.items()}
    for layer in layers:
        norm = weights.shape(f"decoder.layers.{layer}.{_OF_A_LAYER}")
        told[f"blocks.{layer}.attn.q_norm.weight"] = norm
    try:
        return weights, model_of_shapes(told)
    except CheckpointError as reason:
        raise CheckpointError(f"{checkpoint}: {reason}") from reason
