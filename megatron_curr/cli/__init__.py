"""The command line: one function a verb, each of which imports what it runs when it runs.

So ``--help``, ``schema`` and ``trace`` start without torch. A user's mistake becomes one message on
stderr and exit code 2; 1 means that the work failed, 130 that it was interrupted. What the file
system refuses is told like a mistake, from whatever depth it comes: a place that cannot be written
is the user's to change, a disk that is full or broken made the work fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import megatron_curr.incarnation.surroundings  # noqa: F401 (notes the cores before others bind)

# isort: split
from megatron_curr.cli import (  # noqa: F401 (each adds its verbs)
    checkpoints,
    cluster,
    data,
    look,
    train,
    video,
)
from megatron_curr.cli.app import app
from megatron_curr.errors import UserError

_REFUSED_BY_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
_REFUSED_BY_PLACE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ETXTBSY,
    errno.EBUSY,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; ``arguments`` default to the command line's."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="megatron-curr")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except UserError as error:
        _print_error(str(error))
        return 2
    except OSError as error:
        if error.errno not in (*_REFUSED_BY_DISK, *_REFUSED_BY_PLACE):
            raise
        _print_error(_as_sentence(error))
        return 1 if error.errno in _REFUSED_BY_DISK else 2
    return 0


def _as_sentence(error: OSError) -> str:
    names = [_known_place(name) for name in (error.filename, error.filename2) if name is not None]
    why = f"{error.strerror or error}".rstrip(".")
    remedy = {
        errno.ENOENT: "there is no such place, or nothing can be made in it; name another",
        errno.ENOTDIR: "a file stands where a folder is needed; name another place",
        errno.EISDIR: "a folder stands where a file is needed; name another place",
        errno.EEXIST: "a file stands there, or the name is taken; name another place",
        errno.ENOSPC: "free some space there, or name a place on another disk",
        errno.EDQUOT: "free some space there, or name a place on another disk",
        errno.EIO: "the disk does not answer as it should",
    }.get(error.errno or 0, "name a place that you may read and write, or have its rights changed")
    return f"{' -> '.join(dict.fromkeys(names)) or 'a file'}: {why}: {remedy}"


def _known_place(name: str | bytes | int) -> str:
    """The place as the user knows it: of a file that only grows beside another one, its folder."""
    path = Path(os.fsdecode(name) if isinstance(name, bytes) else str(name))
    is_ours = path.name.startswith(".") or path.suffix in (".lock", ".partial")
    return str(path.parent if is_ours else path)


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)
