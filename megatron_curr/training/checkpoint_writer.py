"""Writes one rank's part of a checkpoint in a forked child, while training goes on.

megatron-core plans what each rank writes and reads it all back; what lies between is ours, for
three reasons. Its asynchronous queue starts a manager process on the first save (2 to 5 s, and it
outlives a killed rank); its synchronous part writes ``common.pt`` on rank 0 between collectives,
so a full disk there leaves the other ranks waiting for ever; and a writer that dies takes the run
with it. Here each rank forks once: the child sees the tensors as they were at that instant (the
kernel copies pages that training changes afterwards), writes, flushes, reads back for the
checksum, and leaves its result in anonymous memory. The files are megatron-core's ``torch_dist``.
"""

from __future__ import annotations

import gc
import io
import json
import os
import pickle
import select
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Never

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)

from megatron_curr.training import local_copy
from megatron_curr.training.checkpoint_folder import STATE, file_record
from megatron_curr.training.signals import STOP_SIGNALS, die_with_parent

NUM_FORKS = 3
READY_WITHIN_S = 10.0  # a fork takes milliseconds, on an overloaded node perhaps a second


class RankWriter(FileSystemWriterAsync):
    """Keeps what this rank has to write; one file a rank."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Resolve the plan's items; tensors on a device are copied to the host here."""
        self.file_name = f"{plan.storage_data.prefix}0.distcp"
        self.items: list[tuple[WriteItem, io.BytesIO | Tensor]] = []
        for item in sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO):
            data = planner.resolve_data(item)
            self.items.append((item, data.detach().cpu() if isinstance(data, Tensor) else data))

    def write_items(self, path: Path) -> list[Any]:
        """Write this rank's file to ``path``; returns torch's write results."""
        if not self.items:
            return []
        with path.open("wb") as stream:
            results = [
                _write_item(
                    self.transforms,
                    stream,
                    # a view would be stored with all of the storage behind it
                    data.contiguous().clone() if _is_view(data) else data,
                    item,
                    self.file_name,
                    SerializationFormat.TORCH_SAVE,
                )
                for item, data in self.items
            ]
            stream.flush()
            os.fsync(stream.fileno())
        return results


def _is_view(data: io.BytesIO | Tensor) -> bool:
    return isinstance(data, Tensor) and (
        data.untyped_storage().nbytes() != data.numel() * data.itemsize
    )


@dataclass
class Written:
    """What one rank's child reports."""

    error: str | None = None
    results: list[Any] = field(default_factory=list)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)


class RankSave:
    """One rank's share of one save: planned, then written by a child, then finished."""

    def __init__(
        self,
        folder: Path,
        sharded_state: dict[str, Any],
        *,
        state_json: str,
        validate: bool,
        node_local: Path | None = None,
    ) -> None:
        """Collective: all ranks plan together. ``sharded_state`` also holds the plain values.

        ``node_local`` is a folder on this node's own disk in which to write first.
        """
        self.folder = folder
        self._local = node_local and node_local / f"{folder.name}-{os.getpid()}.distcp"
        self._state_json = state_json
        sharded, self._common = save_preprocess(sharded_state, validate_access_integrity=validate)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
        self._writer = RankWriter(str(folder))
        (_, self._metadata, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False),
            self._writer,
            None,
            0,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self._child: Child | None = None
        self._written: Written | None = None

    def start(self) -> None:
        """Begin writing in a child; where none can be made, write here and now."""
        try:
            self._child = Child(self._write, then=self._carry)
        except OSError:
            self._local = None
            self._written = self._write()

    @property
    def is_writing(self) -> bool:
        """Whether the child is still at it."""
        return self._child is not None and not self._child.has_ended()

    def wait(self) -> Written:
        """The child's report, waiting for it."""
        if self._written is None:
            assert self._child is not None, "start() comes before wait()"
            report, carried, ending = self._child.result()
            self._written = report or Written(error=f"the process that wrote it {ending}")
            if self._local is not None and self._writer.items and not self._written.error:
                told = json.loads(carried or '{"error": "its copy to the run folder broke off"}')
                self._written.error = told.get("error")
                self._written.records[self._writer.file_name] = told.get("record", {})
        return self._written

    def finish(self, written_by_rank: list[Written]) -> dict[str, dict[str, Any]]:
        """On rank 0: write the index of all ranks' files; returns the known file records."""
        assert isinstance(self._metadata, Metadata)
        self._writer.finish(self._metadata, [written.results for written in written_by_rank])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        return {
            name: record for written in written_by_rank for name, record in written.records.items()
        }

    def _carry(self) -> list[str]:
        """The program that the child becomes when it has written; none where nothing is left."""
        if self._local is None or not self._local.exists():
            return []
        target = self.folder / self._writer.file_name
        return [sys.executable, "-m", local_copy.__name__, str(self._local), str(target)]

    def _write(self) -> Written:
        written = Written()
        try:
            if self._local is not None:
                self._local.parent.mkdir(parents=True, exist_ok=True)
            written.results = self._writer.write_items(
                self._local or self.folder / self._writer.file_name
            )
            is_there = self._writer.items and self._local is None
            names = [self._writer.file_name] if is_there else []
            if dist.get_rank() == 0:
                torch.save(self._common, self.folder / COMMON_STATE_FNAME)
                (self.folder / STATE).write_text(self._state_json, encoding="utf-8")
                names += [COMMON_STATE_FNAME, STATE]
            written.records = {name: file_record(self.folder / name) for name in names}
        except Exception as error:  # reported to the parent, which decides for all ranks
            written.error = f"{type(error).__name__}: {error}"
        return written


class Child:
    """A forked process that runs one function and leaves its pickled result in memory.

    It may then become another program, which is told where to append what it has to say.

    A child says when it has come to itself. In CPython 3.11 one in thousands does not: ``fork``
    copies a lock of the interpreter that a thread of gloo's or torch's held at that instant, and
    waits for it for ever (docs/log.md). Such a child is killed and another one made.
    """

    def __init__(
        self, work: Callable[[], Any], *, then: Callable[[], list[str]] = lambda: []
    ) -> None:
        """Raises ``OSError`` where no child comes to itself; the caller does the work then."""
        self._memory = os.memfd_create("checkpoint-result")
        self._status: int | None = None
        parent = os.getpid()
        ready, is_ready = os.pipe()
        with os.fdopen(ready), os.fdopen(is_ready, "wb"):
            for _ in range(NUM_FORKS):
                self._pid = os.fork()
                if self._pid == 0:
                    os.write(is_ready, b".")
                    self._be_the_child(parent, work, then)
                if select.select([ready], [], [], READY_WITHIN_S)[0]:
                    return
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
        os.close(self._memory)
        raise OSError(f"none of {NUM_FORKS} forks came to itself in {READY_WITHIN_S:g} s")

    def _be_the_child(
        self, parent: int, work: Callable[[], Any], then: Callable[[], list[str]]
    ) -> Never:
        try:
            gc.disable()  # a collection could touch device tensors that belong to the parent
            die_with_parent(parent)
            torch.set_num_threads(1)  # the threads of the parent's pool are not in this process
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # the parent waits for the save to end
            with os.fdopen(self._memory, "wb", closefd=False) as stream:
                pickle.dump(work(), stream)
            if command := then():
                os.set_inheritable(self._memory, True)
                os.execv(command[0], [*command, str(self._memory)])
        finally:
            os._exit(0)

    def has_ended(self) -> bool:
        """Whether the process is over; does not wait."""
        if self._status is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def result(self) -> tuple[Any, bytes, str]:
        """What the function returned, or None; what was appended; how it ended. Waits, frees."""
        if self._status is None:
            _, self._status = os.waitpid(self._pid, 0)
        with os.fdopen(self._memory, "rb") as stream:
            stream.seek(0)
            has_result = os.fstat(stream.fileno()).st_size > 0
            code = os.waitstatus_to_exitcode(self._status)
            result = pickle.load(stream) if has_result and code == 0 else None
            appended = stream.read()
        ending = f"was killed by signal {-code}" if code < 0 else "left no result"
        return result, appended, ending
