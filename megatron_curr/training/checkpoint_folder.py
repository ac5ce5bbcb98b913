"""What a checkpoint folder holds, and how a whole one is told from a torn one. No torch here.

``checkpoints/step_00000123/`` holds the tensors as megatron-core's ``torch_dist`` format writes
them, ``state.json`` (the clock and everything else that is not a tensor) and ``manifest.json``
(size and SHA-256 of every other file). It grows in the pen of the incarnation that writes it, is
read back into the manifest, flushed to disk, renamed, and only then named in
``checkpoints/latest``. A folder that carries a ``step_`` name was therefore whole once; the
manifest tells whether it still is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from itertools import chain, count
from pathlib import Path
from typing import Any

from megatron_curr.durable import sync, write_durably
from megatron_curr.incarnation.fence import Pen, fence_others
from megatron_curr.incarnation.record import incarnations

MANIFEST = "manifest.json"
STATE = "state.json"
LATEST = "latest"
STATE_FORMAT = 1
_STEP_NAME = re.compile(r"step_(\d{8,})")
_READ_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class SourceState:
    """How far one source has been read."""

    consumed_tokens: int
    epochs: float
    num_tokens: int  # size of the source's shards, to notice that they changed


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything of a run that is not a tensor; stored, never derived."""

    consumed_tokens: int
    step: int
    optimizer_step: int  # updates applied: ``step`` less the refused ones
    ledger_head: str
    recipe_fingerprint: str
    sources: dict[str, SourceState]
    nonfinite_steps: int  # refused updates, whole run
    nonfinite_in_a_row: int
    keep: bool  # spared by retention
    layout: dict[str, int]
    versions: dict[str, str]
    format: int = STATE_FORMAT

    def to_json(self) -> str:
        """The text of ``state.json``."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> RunState:
        """Inverse of ``to_json``. Raises ``ValueError`` on anything else."""
        values = json.loads(text)
        known = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or not known <= values.keys():
            raise ValueError("fields are missing")
        if values["format"] != STATE_FORMAT:
            raise ValueError(f"format {values['format']}, this version reads {STATE_FORMAT}")
        sources = {name: SourceState(**state) for name, state in values["sources"].items()}
        return cls(**{**{name: values[name] for name in known}, "sources": sources})


def step_folder_name(step: int) -> str:
    """Name of the checkpoint taken after ``step`` steps."""
    return f"step_{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints under ``folder``, oldest first; whole or not."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _STEP_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return [path for _, path in sorted(found)]


def read_state(checkpoint: Path) -> RunState:
    """The checkpoint's ``state.json``. Raises ``OSError`` or ``ValueError`` where unreadable."""
    return RunState.from_json((checkpoint / STATE).read_text(encoding="utf-8"))


def file_record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file as it reads back now."""
    digest = hashlib.sha256()
    size_bytes = 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size_bytes += len(block)
    return {"size_bytes": size_bytes, "sha256": digest.hexdigest()}


def write_manifest(folder: Path, known: dict[str, dict[str, Any]]) -> int:
    """Record every file of ``folder``, reading back those not in ``known``; returns total bytes."""
    records = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = str(path.relative_to(folder))
            records[name] = known.get(name) or file_record(path)
    write_durably(folder / MANIFEST, json.dumps({"files": records}, indent=1) + "\n")
    return sum(record["size_bytes"] for record in records.values())


def find_fault(checkpoint: Path, *, share: tuple[int, int] = (0, 1)) -> str | None:
    """Why this checkpoint cannot be used, or None when it is whole.

    ``share`` is (index, count): sizes of all files are compared, checksums of every count-th one,
    so that ranks can divide the reading between them.
    """
    try:
        records = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        items = sorted((name, r["size_bytes"], r["sha256"]) for name, r in records.items())
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable JSON"
    for name, size_bytes, _ in items:
        try:
            found_bytes = (checkpoint / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found_bytes != size_bytes:
            return f"{name} has {found_bytes:,} bytes instead of {size_bytes:,}"
    index, count = share
    for name, _, sha256 in items[index::count]:
        try:
            if file_record(checkpoint / name)["sha256"] != sha256:
                return f"{name} does not match its checksum"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    try:
        read_state(checkpoint)
    except (OSError, ValueError, TypeError) as error:
        return f"{STATE} is unreadable ({error})"
    return None


def set_aside(checkpoint: Path, pen: Pen, *, as_: str = "torn") -> Path:
    """Take a checkpoint out of the row without losing what is left of it; where it is now."""
    names = (f"{as_}{number}-{checkpoint.name}" for number in count(2))
    names = chain([f"{as_}-{checkpoint.name}"], names)
    target = next(path for name in names if not (path := checkpoint.with_name(name)).exists())
    pen.put(pen.take(checkpoint), target)
    return target


def go_back(run_folder: Path, *, before_step: int) -> Path | None:
    """Make the newest intact checkpoint from before a step the one to resume from; None if none is.

    To be called between two incarnations: the last one's pen is taken away first. Later
    checkpoints stay beside it, as ``left-step_...``.
    """
    folder = run_folder / "checkpoints"
    known = list_checkpoints(folder)
    earlier = [path for path in known if path.name < step_folder_name(before_step)]
    chosen = next((path for path in reversed(earlier) if find_fault(path) is None), None)
    if chosen is not None:
        past = incarnations(run_folder)
        fence_others(run_folder, past[-1].number + 1 if past else 1)
        pen = Pen.beside(folder)
        for later in known[known.index(chosen) + 1 :]:
            set_aside(later, pen, as_="left")
        pen.write(folder / LATEST, chosen.name + "\n")
        shutil.rmtree(pen.folder)
    return chosen


def publish(saving: Path, target: Path, pen: Pen) -> None:
    """Flush ``saving``, which grew in the pen, give it its name, and name it in ``latest``."""
    for path in saving.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
    sync(saving)
    pen.put(saving, target)
    pen.write(target.parent / LATEST, target.name + "\n")


def retire(folder: Path, keep_last: int, pen: Pen) -> list[Path]:
    """Remove all but the newest ``keep_last`` checkpoints and those marked to be kept."""
    removed = []
    for path in list_checkpoints(folder)[:-keep_last]:
        with contextlib.suppress(OSError, ValueError, TypeError):
            if read_state(path).keep:
                continue
        pen.remove(path)
        removed.append(path)
    return removed


def is_keeper(folder: Path, consumed_tokens: int, keep_every_tokens: int | None) -> bool:
    """Whether this checkpoint is the first one past a multiple of ``keep_every_tokens``."""
    if keep_every_tokens is None:
        return False
    reached = max((state.consumed_tokens for state in _states(folder) if state.keep), default=0)
    return consumed_tokens // keep_every_tokens > reached // keep_every_tokens


def _states(folder: Path) -> Iterator[RunState]:
    for path in list_checkpoints(folder):
        with contextlib.suppress(OSError, ValueError, TypeError):
            yield read_state(path)
