"""The folder in which an output grows, and the place where it will appear."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_curr.durable import sync
from megatron_curr.errors import DataError

SPLITS = ("train", "heldout")
MANIFEST = "manifest.json"


def staging_of(output: Path) -> Path:
    """Where ``output`` grows: beside it."""
    return output.with_name(output.name + ".partial")


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to touch a folder that is there, unless it is ours and was offered up."""
    if not output.exists():
        return
    if not overwrite:
        raise DataError(
            f"{output}: already there, from other input or options; give another --output, or "
            "--overwrite to replace it"
        )
    ours = any((output / split / MANIFEST).is_file() for split in SPLITS)
    if not ours and any(output.iterdir()):
        raise DataError(f"{output}: holds other files than shards of ours; give another --output")


@contextmanager
def trouble_told(staging: Path) -> Iterator[None]:
    """Make a full disk and missing rights a ``DataError``."""
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{error.filename}: may not be read or written here") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{staging}: the disk is full; nothing was published, what was finished is kept. Free "
            "some space and run the same command again"
        ) from error


@contextmanager
def locked(staging: Path, *, alone: bool) -> Iterator[None]:
    """Keep other runs out: array tasks share the folder, everything else has it ``alone``.

    What a killed run left half done in ``units/`` is swept out by who is alone.
    """
    with open(staging / "lock", "w") as lock:
        try:
            fcntl.flock(lock, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{staging}: another run is at work in it; wait for it, or end it"
            ) from None
        except OSError:  # a file system without locks; two runs then only do some work twice
            alone = False
        if alone:
            for left in (staging / "units").glob("*.partial"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def publish(folder: Path, output: Path) -> None:
    """Let the finished folder appear under its name, an old one go only then, and all else of the
    staging area with it."""
    sync(folder)
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(folder, output)
    sync(output.parent)
    shutil.rmtree(old, ignore_errors=True)
    discard(output)


def discard(output: Path) -> None:
    """Remove the staging area. It loses its name first: half of one must not be taken up again."""
    trash = output.with_name(output.name + ".trash")
    shutil.rmtree(trash, ignore_errors=True)
    if staging_of(output).exists():
        os.rename(staging_of(output), trash)
        shutil.rmtree(trash, ignore_errors=True)
