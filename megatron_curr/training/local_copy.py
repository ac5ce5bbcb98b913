"""Carries a rank's part of a checkpoint from its node's own disk to the run folder.

    python -m megatron_curr.training.local_copy SOURCE TARGET RESULT_DESCRIPTOR

The process that wrote it becomes this program, and so lets go of the memory it shared with the
training process, however slow the run folder's disk is. What was copied is read back there; the
record of it is left behind the writer's own report.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

from megatron_curr.errors import RecipeError
from megatron_curr.training.checkpoint_folder import file_record


def local_folder(wanted: str) -> Path:
    """The folder of this run on this node's own disk, with the node's variables filled in.

    Raises ``RecipeError`` where that gives no absolute path.
    """
    folder = Path(os.path.expandvars(wanted))
    if not folder.is_absolute():
        raise RecipeError(
            f"node_local of the profile: {wanted} is {folder} on {socket.gethostname()}, which is "
            "not absolute; set its variable in setup or environment, or name the folder itself"
        )
    return folder


def local_fault(folder: Path) -> str:
    """Make the folder, without what ranks that were killed left in it; why that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.distcp"):
            left.unlink(missing_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return str(error)
    return ""


def carry(source: Path, target: Path) -> dict[str, object]:
    """Copy, flush, read back, remove the source; the record, or what the file system said."""
    try:
        with source.open("rb") as read, target.open("wb") as written:
            shutil.copyfileobj(read, written, 4 << 20)
            written.flush()
            os.fsync(written.fileno())
        return {"record": file_record(target)}
    except OSError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    finally:
        source.unlink(missing_ok=True)


if __name__ == "__main__":
    told = carry(Path(sys.argv[1]), Path(sys.argv[2]))
    with os.fdopen(int(sys.argv[3]), "ab") as result:
        result.write(json.dumps(told).encode())
