"""Is a checkpoint of this model? The names and shapes of its tensors tell before any is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_curr.errors import CheckpointError

Shape = tuple[int, ...]
_OPTIMIZER = "optimizer."


def check_architecture(checkpoint: Path, model_state: Mapping[str, Any]) -> None:
    """Raise ``CheckpointError`` naming the first parameter, in model order, that differs.

    ``model_state`` is this rank's sharded state. Collective: every rank raises the same error.
    Layers that are alike are one stored tensor, whose first dim counts them.
    """
    wanted = _shapes_of_all_ranks(model_state)
    stored = {
        name: tuple(tensor.global_shape)
        for name, tensor in dist_checkpointing.load_tensors_metadata(str(checkpoint)).items()
        if not name.startswith(_OPTIMIZER)
    }
    for name in dict.fromkeys([*wanted, *sorted(stored)]):
        if wanted.get(name) != stored.get(name):
            raise CheckpointError(
                f"{checkpoint}: the checkpoint is of another model or vocabulary: {name} "
                f"{_told(stored.get(name))} in the checkpoint and {_told(wanted.get(name))} in the "
                f"recipe's model; load it with the recipe it was saved by, or start a new run "
                f"under another name"
            )


def _told(shape: Shape | None) -> str:
    return "is not" if shape is None else f"is {' x '.join(map(str, shape))}"


def _shapes_of_all_ranks(model_state: Mapping[str, Any]) -> dict[str, Shape]:
    """Shapes of whole tensors by stored name, in model order, of every pipeline stage."""
    parts, _ = extract_sharded_tensors_and_factories(dict(model_state))
    apply_factories(parts)
    mine = {
        tensor.key: tuple(tensor.global_shape)
        for tensor in nested_values(parts)
        if isinstance(tensor, ShardedTensor)
    }
    everyone: list[dict[str, Shape]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return {name: shape for part in everyone for name, shape in part.items()}
