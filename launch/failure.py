"""Which rank failed, and of what: from exit codes, the stories that ranks left, and their logs.

A rank that dies takes the others with it, and they complain first and loudest. So a complaint of
lost contact is an echo, told only where nobody has anything better to say.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_CRASH = "Fatal Python error"  # how faulthandler begins
_MOST_LINES = 40
_BY_HAND_OR_KERNEL = "kill -9, or the kernel where memory runs out; dmesg tells"


@dataclass(frozen=True)
class Story:
    """What a rank said before it left with a failure."""

    rank: int
    at_s: float  # Unix time
    text: str
    is_expected: bool = False  # told in full by its message; else the text is a traceback
    is_echo: bool = False  # it lost contact with others

    def write(self, folder: Path) -> None:
        """Leave it in the launcher's folder, whole."""
        partial = folder / f".{self.rank}.partial"
        partial.write_text(json.dumps(self.__dict__), encoding="utf-8")
        partial.replace(folder / f"{self.rank}.json")

    @classmethod
    def read(cls, folder: Path, rank: int) -> Story | None:
        """What a rank left; None where it left nothing."""
        path = folder / f"{rank}.json"
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    @property
    def moral(self) -> str:
        """The last line: the error without the way to it."""
        return self.text.rstrip().rpartition("\n")[2]


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended by itself."""

    rank: int
    code: int  # negative: the signal that killed it
    at_s: float  # Unix time, at the latest
    story: Story | None
    output: str  # what it printed where nobody saw it

    @property
    def is_silent(self) -> bool:
        """Whether it left no story."""
        return self.story is None

    @property
    def how(self) -> str:
        """``was killed by SIGSEGV``, ``ended with exit code 3``."""
        if self.code >= 0:
            early = "" if self.code else " before the run was over"
            return f"ended with exit code {self.code}{early}"
        name = signal.Signals(-self.code).name
        return f"was killed by {name}" + (
            f" ({_BY_HAND_OR_KERNEL})" if self.code == -signal.SIGKILL else ""
        )


def first_failure(ends: Sequence[RankEnd]) -> RankEnd:
    """The rank at fault; ``ends`` are those that ended before the launcher stepped in.

    What was expected comes first; then whoever died of itself, a silent one or one with a story,
    by time; an echo only where there is nothing else. A rank that left with code 0 and without a
    word is at fault where all others lost contact.
    """

    def order(end: RankEnd) -> tuple[int, float]:
        story = end.story
        if story is None:
            return (1 if end.code else 2), end.at_s
        return (3 if story.is_echo else 0 if story.is_expected else 1), story.at_s

    return min(ends, key=order)


def describe(end: RankEnd, ends: Sequence[RankEnd]) -> str:
    """The failure as the user reads it: a message, or who failed and that rank's own traceback."""
    story = end.story
    if story is None:
        shown = _own_traceback(end.output)
        return "\n".join([f"rank {end.rank} {end.how}" + ":" * bool(shown), *shown])
    if story.is_expected:
        return story.text
    alike = [e for e in ends if e.story is not None and e.story.moral == story.moral]
    who = f"rank {end.rank} failed"
    if len(alike) > 1:
        who = f"{len(alike)} ranks failed alike, rank {end.rank} first"
    return f"{who}:\n{story.text}"


def _own_traceback(output: str) -> list[str]:
    """Of a crash, what it was and the stack of the thread that crashed; else the last lines."""
    _, crash, stacks = output.rpartition(_CRASH)
    if not crash:
        return output.strip().splitlines()[-_MOST_LINES:]
    what, *paragraphs = stacks.split("\n\n")
    own = [text for text in paragraphs if text.startswith("Current thread")]
    return [crash + what.rstrip(), *"".join(own).splitlines()[:_MOST_LINES]]
