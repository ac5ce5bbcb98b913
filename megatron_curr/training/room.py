"""Whether a run folder can be written, and has room for the run's checkpoints. No torch here."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass

from megatron_curr.errors import CheckpointError
from megatron_curr.plan.dit import dit_parameters
from megatron_curr.plan.model_size import num_parameters
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.preflight import Prepared
from megatron_curr.units import format_bytes

# fp32 weights and two moments, and as much again while the checkpoint before is kept.
_BYTES_PER_PARAMETER = 2 * 12


@dataclass(frozen=True)
class Room:
    """The disk of a run folder."""

    needed_bytes: int  # of two checkpoints
    free_bytes: int

    @property
    def fault(self) -> str | None:
        """What is wrong, and what to do."""
        if self.free_bytes >= self.needed_bytes:
            return None
        return (
            f"the run folder's disk has {format_bytes(self.free_bytes)} free, two checkpoints need "
            f"{format_bytes(self.needed_bytes)}; free some, or move run_folder"
        )


def num_weights(prepared: Prepared) -> int:
    """Parameters of the model."""
    recipe = prepared.recipe
    if isinstance(recipe, VideoRecipe):
        return dit_parameters(recipe.model)
    return num_parameters(recipe.model, vocab_size=prepared.vocab_size)


def needed_bytes(prepared: Prepared) -> int:
    """What the run folder's disk must have free when the run starts."""
    return num_weights(prepared) * _BYTES_PER_PARAMETER


def check_room(prepared: Prepared) -> Room:
    """Raise ``CheckpointError`` where this machine cannot write the run folder, or not enough."""
    folder = prepared.folder.checkpoints
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_symlink() or p.exists())
    try:
        with tempfile.TemporaryFile(dir=place):  # no name, so nothing to see and nothing left
            room = Room(needed_bytes(prepared), shutil.disk_usage(place).free)
    except OSError as error:
        raise CheckpointError(
            f"{prepared.folder.path}: the run folder cannot be written ({error.strerror}: "
            f"{place}); set run_folder to a place you may write to, with room on its disk"
        ) from None
    if room.fault:
        raise CheckpointError(f"{prepared.folder.path}: {room.fault}")
    return room
