"""The folder a conversion writes: beside its place, and in its place once it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_curr.durable import sync
from megatron_curr.errors import CheckpointError

_PLAN = "plan.json"


def check_empty(output: Path) -> None:
    """Raise ``CheckpointError`` when the target holds anything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output}: is not an empty folder; give another target or remove it first"
        )


@contextmanager
def written_beside(output: Path, plan: Mapping[str, Any]) -> Iterator[Path]:
    """A folder that takes ``output``'s place when the block ends, and goes when it fails.

    A conversion that was killed or interrupted leaves the folder; one of the same ``plan`` finds
    it again, with every file that was whole. Raises ``CheckpointError`` when another conversion
    writes it now, or the disk is full.
    """
    check_empty(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial")
    lock_path = output.with_name(f".{output.name}.lock")
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{output}: another conversion is writing it; wait for it, or give another place"
            ) from None
        try:
            text = json.dumps(plan, sort_keys=True, indent=1)
            if not _is_of(partial, text):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                (partial / _PLAN).write_text(text, encoding="utf-8")
            yield partial
            (partial / _PLAN).unlink()
            for path in partial.rglob("*"):
                sync(path)
            check_empty(output)
            os.replace(partial, output)  # over an empty folder, too
            sync(output.parent)
        except Exception as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise CheckpointError(
                    f"{output}: does not fit on the disk; make room or give another place"
                ) from error
            raise
        finally:
            lock_path.unlink(missing_ok=True)


def _is_of(partial: Path, text: str) -> bool:
    try:
        return (partial / _PLAN).read_text(encoding="utf-8") == text
    except OSError:
        return False
