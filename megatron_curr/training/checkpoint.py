"""Save a run and pick it up again, on the same layout or another.

Saving is three stages: plan (all ranks, blocks), write (a forked child a rank, does not block),
publish (all ranks agree that every part is whole, rank 0 names it; blocks for milliseconds). What
blocks is measured. Any ``OSError`` on any rank, a full disk first of all, gives the save up on
all ranks: the partial folder goes, the checkpoint before it stays, the run goes on. Everything is
written with the incarnation's pen, so a stale one can neither name nor remove a checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.optimizer import MegatronOptimizer

from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.fence import Pen
from megatron_curr.recipe.schema import Checkpoint
from megatron_curr.training import optimizer_state
from megatron_curr.training.checkpoint_folder import (
    RunState,
    find_fault,
    is_keeper,
    list_checkpoints,
    publish,
    read_state,
    retire,
    set_aside,
    step_folder_name,
    write_manifest,
)
from megatron_curr.training.checkpoint_shapes import check_architecture
from megatron_curr.training.checkpoint_writer import RankSave, Written


@dataclass(frozen=True)
class SaveReport:
    """How one save went. ``error`` is None when the checkpoint is published."""

    state: RunState
    blocked_s: float
    total_s: float
    size_bytes: int = 0
    error: str | None = None


@dataclass
class _Pending:
    state: RunState
    share: RankSave
    blocked_s: float
    began_s: float


class Checkpointer:
    """Saves and loads the model and optimizer of one rank; every method is collective."""

    def __init__(
        self,
        folder: Path,
        *,
        chunks: list[torch.nn.Module],
        optimizer: MegatronOptimizer,
        pg_collection: Any,
        settings: Checkpoint,
        pen: Pen | None = None,
        node_local: Path | None = None,
        finish_weights: Callable[[], None] = lambda: None,
    ) -> None:
        """``chunks`` are the unwrapped model chunks of this rank; ``folder`` is checkpoints/.

        ``pen`` is the incarnation's; without one, whoever calls is alone with the folder.
        ``node_local`` is a folder on this node's own disk through which a save goes.
        ``finish_weights`` is called before weights are saved; where updated weights are gathered
        late, it waits for them.
        """
        self.folder = folder
        self._pen = pen or Pen.beside(folder)
        self._chunks = chunks
        self._optimizer = optimizer
        self._pg_collection = pg_collection
        self._settings = settings
        self._node_local = node_local
        self._finish_weights = finish_weights
        self._pending: _Pending | None = None
        self._validated = False

    @property
    def is_pending(self) -> bool:
        """Whether a save has begun and is not published; the same on every rank."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's child still writes; differs between ranks."""
        return self._pending is not None and self._pending.share.is_writing

    def is_keeper(self, consumed_tokens: int) -> bool:
        """Whether a checkpoint taken now is one that retention spares."""
        return is_keeper(self.folder, consumed_tokens, self._settings.keep_every_tokens)

    def begin(self, state: RunState) -> SaveReport | None:
        """Start a save; a report only if it failed at once."""
        assert self._pending is None, "publish() the save before it first"
        began_s = time.perf_counter()
        saving = self._pen.folder / step_folder_name(state.step)
        if error := _first_error(_attempt(lambda: self._make_folder(saving))):
            return self._give_up(state, saving, error=error, blocked_s=_since(began_s))
        share = RankSave(
            saving,
            self._sharded_state(state),
            state_json=state.to_json(),
            validate=not self._validated,
            node_local=self._node_local,
        )
        self._validated = True  # the sharding cannot change while the run lives
        share.start()
        self._pending = _Pending(state, share, _since(began_s), began_s)
        return None

    def publish(self) -> SaveReport:
        """Wait for the pending save on all ranks, then name it; or give it up."""
        pending, self._pending = self._pending, None
        assert pending is not None, "begin() comes before publish()"
        began_s = time.perf_counter()
        written: list[Written] = _gather(pending.share.wait())
        error = _first_error([part.error for part in written], gathered=True)
        size_bytes = 0

        def name_it() -> None:
            nonlocal size_bytes
            size_bytes = self._publish_on_rank_0(pending, written)

        error = error or _first_error(_attempt(name_it))
        blocked_s = pending.blocked_s + _since(began_s)
        if error:
            return self._give_up(
                pending.state, pending.share.folder, error=error, blocked_s=blocked_s
            )
        return SaveReport(pending.state, blocked_s, _since(pending.began_s), size_bytes)

    def save(self, state: RunState) -> SaveReport:
        """Save and wait for it."""
        return self.begin(state) or self.publish()

    def load_newest(self) -> tuple[RunState | None, list[str]]:
        """Load the newest intact checkpoint; None if there is none at all.

        Also returns a line for each torn one passed over (they are set aside, as ``torn-``). Raises
        ``CheckpointError`` when there are checkpoints and none is intact.
        """
        rank, world_size = dist.get_rank(), dist.get_world_size()
        torn: list[tuple[Path, str]] = []
        for path in reversed(_gather(list_checkpoints(self.folder))[0]):
            fault = next(filter(None, _gather(find_fault(path, share=(rank, world_size)))), None)
            if fault is None:
                state = read_state(path)
                self._load(path, updates=state.optimizer_step)
                return state, self._set_aside(torn)
            torn.append((path, fault))
        if torn:
            raise CheckpointError(
                f"{self.folder}: no checkpoint is intact: "
                + "; ".join(f"{path.name}: {fault}" for path, fault in torn)
                + ". Restore one of them from a copy, or start a new run under another name"
            )
        return None, []

    def _set_aside(self, torn: list[tuple[Path, str]]) -> list[str]:
        dist.barrier()  # every rank has read what it needs
        if dist.get_rank() == 0:
            for path, _ in torn:
                set_aside(path, self._pen)
        return [
            f"checkpoint {path.name} is torn and was passed over: {fault}" for path, fault in torn
        ]

    def _load(self, path: Path, *, updates: int) -> None:
        model_state = self._model_state()
        check_architecture(path, model_state)
        request: dict[str, Any] = {
            **model_state,
            "optimizer": optimizer_state.sharded_targets(self._optimizer, model_state),
        }
        # Ranks of a distributed optimizer ask for the parameters they own, not for all of them,
        # which megatron-core's check of the access pattern would call a gap.
        loaded = dist_checkpointing.load(request, str(path), validate_access_integrity=False)
        for key, chunk in zip(model_state, self._chunks, strict=True):
            chunk.load_state_dict(loaded[key], strict=True)
        optimizer_state.load_state(self._optimizer, loaded["optimizer"], updates=updates)

    def _sharded_state(self, state: RunState) -> dict[str, Any]:
        self._finish_weights()
        model_state = self._model_state()
        return {
            **model_state,
            "optimizer": optimizer_state.sharded_state(self._optimizer, model_state),
            "consumed_tokens": state.consumed_tokens,
            "step": state.step,
        }

    def _model_state(self) -> dict[str, Any]:
        """The sharded state of every chunk, under ``model0``, ``model1``..."""
        return {
            f"model{index}": chunk.sharded_state_dict(
                metadata={"dp_cp_group": self._pg_collection.dp_cp}
            )
            for index, chunk in enumerate(self._chunks)
        }

    def _publish_on_rank_0(self, pending: _Pending, written: list[Written]) -> int:
        if dist.get_rank() != 0:
            return 0
        records = pending.share.finish(written)
        size_bytes = write_manifest(pending.share.folder, records)
        target = self.folder / step_folder_name(pending.state.step)
        publish(pending.share.folder, target, self._pen)
        retire(self.folder, self._settings.keep_last, self._pen)
        return size_bytes

    def _make_folder(self, saving: Path) -> None:
        if dist.get_rank() == 0:
            self.folder.mkdir(exist_ok=True)
            self._pen.make(saving.name)

    def _give_up(
        self, state: RunState, saving: Path, *, error: str, blocked_s: float
    ) -> SaveReport:
        if dist.get_rank() == 0:
            self._pen.check()  # a stale incarnation must not go on as if a disk were full
            shutil.rmtree(saving, ignore_errors=True)
        dist.barrier()
        return SaveReport(state, blocked_s, blocked_s, error=error)


def _attempt(action: Any) -> str | None:
    """Run ``action``; the error's text when the file system refuses."""
    try:
        action()
    except OSError as error:
        return f"{type(error).__name__}: {error}"
    return None


def _first_error(error: Any, *, gathered: bool = False) -> str | None:
    """The first rank's error, on every rank."""
    errors = error if gathered else _gather(error)
    for rank, text in enumerate(errors):
        if text:
            return f"rank {rank}: {text}"
    return None


def _gather(value: Any) -> list[Any]:
    """``value`` of every rank, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _since(began_s: float) -> float:
    return time.perf_counter() - began_s
