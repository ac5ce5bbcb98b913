"""The command line: one function a verb, each of which imports what it runs when it runs.

So ``--help``, ``schema`` and ``trace`` start without torch. A user's mistake becomes one message on
stderr and exit code 2; 1 means that the work failed, 130 that it was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; ``arguments`` default to the command line's."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="megatron-curr")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except UserError as error:
        _print_error(str(error))
        return 2
    return 0


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)
