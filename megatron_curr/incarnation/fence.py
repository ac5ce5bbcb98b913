"""Claiming a run folder, and the fence that keeps stale incarnations out of it.

Slurm may start a run again while ranks of the start before live on, on a node it has lost sight of.
So an incarnation writes through its *pen*, a folder of its own on the run's disk: whatever shall
stand in the run folder grows in there and is renamed to its place. A successor begins by renaming
the pens of all before it away. Renames are atomic on every shared file system, so a write of a
stale incarnation happened before that, where the successor sees it, or it fails.

No rename leads to another disk. Where ``checkpoints/`` is on one (a symbolic link, a mount), an
incarnation has a second pen there, ``checkpoints/.pens/0003``, that is taken away in the same way.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

from megatron_curr.durable import sync, write_durably
from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.conclude import conclude_one
from megatron_curr.incarnation.record import Claim, Incarnation, incarnations

ALIVE_EVERY_S = 2.0
_WATCH_S = 5 * ALIVE_EVERY_S
_MOST_TRIES = 100


class Fenced(RuntimeError):
    """This incarnation is stale: a successor has taken its pen."""

    is_plain = True


class Pen:
    """The right to write into a run folder, as long as nobody has taken it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def beside(cls, folder: Path) -> Pen:
        """For work outside a run: a pen that nobody takes away."""
        (folder / ".pen").mkdir(parents=True, exist_ok=True)
        return cls(folder / ".pen")

    def check(self) -> None:
        """Raise ``Fenced`` when a successor has taken over."""
        if not self.folder.is_dir():
            raise Fenced(
                f"{self.folder.parent}: this incarnation of the run is stale, a later one has "
                "taken over; nothing was written"
            )

    def write(self, path: Path, text: str) -> None:
        """Replace ``path`` by ``text``, whole. Raises ``Fenced`` or ``OSError``."""
        self._guard(lambda: write_durably(path, text, beside=self.folder))

    def make(self, name: str) -> Path:
        """A new empty folder in which something grows; what an earlier try left there goes."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        self._guard((self.folder / name).mkdir)
        return self.folder / name

    def put(self, grown: Path, target: Path) -> None:
        """Rename what has grown in the pen to its place, where nothing is yet."""
        self._guard(lambda: grown.rename(target))
        sync(target.parent)

    def take(self, folder: Path) -> Path:
        """Rename a folder of the run into the pen; where it is now."""
        held = self.folder / f"taken-{folder.name}"
        self._guard(lambda: folder.rename(held))
        return held

    def remove(self, folder: Path) -> None:
        """Remove a folder of the run and all it holds."""
        shutil.rmtree(self.take(folder), ignore_errors=True)

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError:
            self.check()
            raise


def claim_run(run_folder: Path, make_claim: Callable[[int], Claim]) -> Incarnation:
    """Become the run's incarnation: fence those before, conclude for them, and hold the pen.

    ``make_claim`` is given the number. Raises ``CheckpointError`` where another chain's incarnation
    is alive; one of the same chain is stale by definition and is fenced.
    """
    folder = run_folder / "incarnations"
    folder.mkdir(parents=True, exist_ok=True)
    for _ in range(_MOST_TRIES):
        before = incarnations(run_folder)
        number = before[-1].number + 1 if before else 1
        claim = make_claim(number)
        if before:
            _refuse_if_alive(run_folder, before[-1], claim)
        if _make(folder, claim):
            incarnation = Incarnation(folder / f"{number:04d}")
            if is_elsewhere(incarnation.pen, run_folder / "checkpoints"):
                incarnation.far_pen.parent.mkdir(exist_ok=True)
            fence_others(run_folder, incarnation.number)
            if incarnation.far_pen.parent.is_dir():
                with contextlib.suppress(FileExistsError):  # a successor has taken it already
                    incarnation.far_pen.mkdir()
            return incarnation
    raise CheckpointError(f"{folder}: others claim this run folder all the time; stop them")


def is_elsewhere(pen: Path, folder: Path) -> bool:
    """Whether no rename leads from the pen into a folder; found out by one, since mounts differ."""
    if not folder.is_dir():
        return False
    grown, target = pen / "moved", folder / f".moved-{socket.gethostname()}-{os.getpid()}"
    try:
        grown.mkdir(exist_ok=True)
        grown.rename(target)
        target.rmdir()
    except OSError as error:
        return error.errno == errno.EXDEV
    finally:
        with contextlib.suppress(OSError):
            grown.rmdir()
    return False


def fence_others(run_folder: Path, number: int) -> None:
    """Take the pens of all incarnations before ``number`` and conclude for them."""
    for earlier in incarnations(run_folder):
        if earlier.number < number:
            _take_pen(earlier.pen, earlier.folder / f"taken-by-{number:04d}")
            if earlier.far_pen.parent.is_dir():
                taken = earlier.far_pen.with_name(f"{earlier.number:04d}-taken-by-{number:04d}")
                _take_pen(earlier.far_pen, taken)
                with contextlib.suppress(FileExistsError):  # it may not have come to make it yet
                    earlier.far_pen.touch(exist_ok=False)
                shutil.rmtree(taken, ignore_errors=True)
            conclude_one(run_folder, earlier)
            for left in earlier.folder.glob("taken-by-*"):
                shutil.rmtree(left, ignore_errors=True)


def _take_pen(pen: Path, taken: Path) -> None:
    """Rename a pen away and put a file in its place.

    A stale save that was under way makes the folders that it misses, as torch's writer does: where
    nothing stood in its place, it would have made itself a pen again.
    """
    while pen.is_dir():
        shutil.rmtree(taken, ignore_errors=True)
        pen.rename(taken)
        with contextlib.suppress(FileExistsError):  # such a save was quicker: take that one as well
            pen.touch(exist_ok=False)
        sync(pen.parent)


def _make(folder: Path, claim: Claim) -> bool:
    """The incarnation's folder appears with its pen and its claim, or not at all."""
    new = folder / f".new-{claim.host}-{claim.pid}"
    shutil.rmtree(new, ignore_errors=True)
    (new / "pen").mkdir(parents=True)
    (new / "alive").touch()
    write_durably(new / "claim.json", claim.to_json())
    try:
        new.rename(folder / f"{claim.incarnation:04d}")
    except OSError:
        shutil.rmtree(new, ignore_errors=True)
        if not (folder / f"{claim.incarnation:04d}").is_dir():
            raise
        return False
    sync(folder)
    return True


def show_life(incarnation: Incarnation) -> None:
    """To be called every ``ALIVE_EVERY_S``: lets others see that this incarnation lives."""
    os.utime(incarnation.folder / "alive")


def refuse_if_alive(run_folder: Path) -> None:
    """Raises ``CheckpointError`` when an incarnation of the run lives, here or on another host.

    One on this host died, or the run's lock would be held. Elsewhere locks may not be seen, so its
    sign of life is watched for a while; no two clocks are compared.
    """
    newest = incarnations(run_folder)[-1:]
    if newest and not _is_over_or_of(newest[0], host=socket.gethostname()):
        _watch(run_folder, newest[0])


def _refuse_if_alive(run_folder: Path, newest: Incarnation, ours: Claim) -> None:
    """Like ``refuse_if_alive``, but for one of our own chain, which is ours to take over from."""
    claim = newest.claim
    if claim is not None and ours.chain == claim.chain:
        return
    if not _is_over_or_of(newest, host=ours.host):
        _watch(run_folder, newest)


def _is_over_or_of(newest: Incarnation, *, host: str) -> bool:
    claim = newest.claim
    return claim is None or newest.record is not None or claim.host == host


def _watch(run_folder: Path, newest: Incarnation) -> None:
    claim = newest.claim
    assert claim is not None
    alive = newest.folder / "alive"
    seen_ns = alive.stat().st_mtime_ns
    until_s = time.monotonic() + _WATCH_S
    while time.monotonic() < until_s:
        time.sleep(ALIVE_EVERY_S / 4)
        if newest.record is not None:
            return
        if alive.stat().st_mtime_ns != seen_ns:
            job = f"job {claim.job_id}" if claim.job_id else f"pid {claim.pid}"
            raise CheckpointError(
                f"{run_folder}: this run folder is already in use by {job} on host {claim.host}; "
                "wait for that run, stop it, or give this one another name or run_folder"
            )
