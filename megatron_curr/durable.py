"""Small files that are whole or not there, whatever happens meanwhile."""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str, *, beside: Path | None = None) -> None:
    """Replace ``path`` by ``text`` in one move: a reader sees the old content or the new.

    The new content grows in the folder ``beside``, on the same disk; by default next to ``path``.
    """
    partial = (beside or path.parent) / f".{path.name}.partial"
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_once(path: Path, text: str) -> bool:
    """Make ``path`` with ``text``, whole, unless it is there; whether this call made it.

    Of several that try at once, on any machines that share the disk, one succeeds.
    """
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, path)
    except FileExistsError:
        return False
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)
    return True


def sync(path: Path) -> None:
    """Make a file, or the renames and new names inside a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
