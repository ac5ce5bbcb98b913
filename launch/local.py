"""Start a run's ranks as processes on this machine, and look after them.

Input is checked here, before any rank starts, so that a mistake is told once and costs a second.
Ranks meet in a file (no ports) and die with this process. The first rank to fail takes the others
down, and its story is told first. Stop signals are passed on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from launch.check import check_run
from launch.failure import RankEnd, Story, describe, first_failure
from megatron_curr.incarnation.conclude import conclude
from megatron_curr.incarnation.record import Ending, Incarnation, Record, incarnations
from megatron_curr.incarnation.surroundings import CORES_AT_START, is_of_a_launcher, pins_threads
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.training.signals import STOP_SIGNALS, is_left_to_us

_POLL_S = 0.05
_GRACE_S = 1.0  # for ranks that fail because another did, to leave their story too
_SIGNALLED = 128  # exit codes of what a signal ended, as shells have them: this plus its number


def launch_training(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    ranks: int = 1,
    *,
    stop_at_tokens: int | None = None,
) -> int:
    """Train on ``ranks`` processes; the exit code.

    0 complete or at ``stop_at_tokens``, 1 failed, 2 input; 128 and the signal's number where one
    asked for the end: what follows on a command line does not take the run for complete. Raises
    ``UserError`` for what is wrong before any rank starts; nothing is written then.
    """
    recipe = load_recipe(recipe_path, overrides)
    prepared = check_run(recipe, ranks)
    folder = prepared.folder
    folder.check_free()
    for warning in prepared.warnings:
        print(warning, file=sys.stderr, flush=True)
    with TemporaryDirectory(prefix="megatron-curr-") as name:
        meeting = Path(name)
        resolved = meeting / "recipe.yaml"
        resolved.write_text(dump_recipe(recipe), encoding="utf-8")
        arguments = [str(resolved), "--rendezvous", f"file://{meeting}/store"]
        arguments += ["--failures", str(meeting), "--parent", str(os.getpid())]
        if stop_at_tokens is not None:
            arguments += ["--stop-at", str(stop_at_tokens)]
        with Crew(arguments, ranks, meeting) as crew:
            outcome = crew.wait()
    return _conclude(folder, crew, outcome)


def _conclude(folder: RunFolder, crew: Crew, outcome: Outcome) -> int:
    """See to the record of what the ranks were, tell the user of a failure; the exit code."""
    newest = incarnations(folder.path)[-1:]
    ours = [i for i in newest if i.claim is not None and i.claim.pid in crew.pids]
    if not ours:
        if outcome.text is not None:
            print_error(outcome.text)
        return outcome.code
    (incarnation,) = ours
    spoke = {ending.rank for ending in incarnation.endings}
    for end in outcome.ends:
        if end.story is None and end.rank not in spoke:
            _leave_word_for(end, folder, incarnation)
    record = conclude(folder.path)
    assert record is not None, "there is a claim"
    cause, _, name = record.cause.partition(":")
    if not outcome.code and cause in ("complete", "stop-at"):
        return 0
    if not outcome.code and cause in ("interrupted", "signal"):
        return _SIGNALLED + getattr(signal, name or "SIGINT", signal.SIGTERM)
    first = outcome.first
    is_told = first is not None and (
        not first.story.is_echo if first.story else first.rank not in spoke
    )
    failure = outcome.text if is_told else record.detail  # of a hang, only the record tells
    if not outcome.was_broken_off:
        print_error("\n".join([str(failure), *_what_is_left(folder, record, crew.num_ranks)]))
    return outcome.code or 1


def _leave_word_for(end: RankEnd, folder: RunFolder, incarnation: Incarnation) -> None:
    """For a rank that died without a word: only its exit code, which we have, tells of what."""
    claim, beat = incarnation.claim, incarnation.beat
    assert claim is not None
    when = "while training" if beat is not None else "before the first step"
    ending = Ending(
        rank=end.rank,
        node=claim.host,
        at_s=end.at_s,
        cause="lost-rank",
        detail=f"rank {end.rank} on {claim.host} {end.how}, {when}",
        step=beat.step if beat is not None else None,
    )
    with contextlib.suppress(OSError):
        incarnation.leave_word(ending)
        with folder.rank_log(incarnation.number, end.rank).open("a") as log:
            log.write(f"\nrank {end.rank} {end.how}\n{end.output}\n")


def _what_is_left(folder: RunFolder, record: Record, num_ranks: int) -> list[str]:
    """What a start that failed leaves: what is saved, how to go on, where to read more."""
    if not record.may_continue:
        return []
    state = folder.newest_state()
    saved = "saved: nothing yet; the run begins again at token 0"
    if state is not None:
        lost = max(record.consumed_tokens - state.consumed_tokens, 0)
        saved = f"saved: the checkpoint of step {state.step}, token {state.consumed_tokens:,}" + (
            f"; the {lost:,} tokens after it will be trained again" if lost else ""
        )
    return [
        saved,
        f"to go on: {folder.resume_command(num_ranks)}",
        f"logs of all ranks: {folder.rank_log(record.incarnation, 0).parent}",
    ]


@dataclass(frozen=True)
class Outcome:
    """How a crew ended. ``ends`` are the ranks that ended before we stepped in, if one failed."""

    code: int
    ends: tuple[RankEnd, ...] = ()

    @property
    def first(self) -> RankEnd | None:
        """The rank at fault."""
        return first_failure(self.ends) if self.ends else None

    @property
    def text(self) -> str | None:
        """The failure for the user."""
        return describe(self.first, self.ends) if self.first is not None else None

    @property
    def was_broken_off(self) -> bool:
        """Whether the user did not wait for the end."""
        return self.code == _SIGNALLED + signal.SIGINT


class Crew:
    """The rank processes of one run; each is ``python -m module`` with the arguments."""

    def __init__(
        self,
        arguments: Sequence[str],
        ranks: int,
        meeting: Path,
        *,
        module: str = "launch.worker",
    ) -> None:
        self._meeting = meeting
        self._module = module
        self._num_interrupts = 0
        self._ended_s: dict[int, float] = {}  # by rank; Unix time
        os.sched_setaffinity(0, CORES_AT_START)  # ranks inherit it, and OpenMP may have bound us
        self._processes = [self._start(arguments, rank, ranks) for rank in range(ranks)]
        self.num_ranks = ranks
        self.pids = {process.pid for process in self._processes}
        self._handlers = {
            number: signal.signal(number, self._pass_on)
            for number in STOP_SIGNALS
            if is_left_to_us(number)
        }

    def _start(self, arguments: Sequence[str], rank: int, ranks: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", self._module, *arguments]
        environment = environment_of_rank(os.environ, rank, ranks)
        if rank == 0:
            return subprocess.Popen(command, env=environment, start_new_session=True)
        with (self._meeting / f"{rank}.out").open("wb") as output:
            return subprocess.Popen(
                command,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the ranks once, through us
            )

    def wait(self) -> Outcome:
        """Wait for the ranks; at the first failure give the others a moment to tell theirs."""
        while True:
            codes = self._poll()
            if self._num_interrupts > 1:
                return Outcome(_SIGNALLED + signal.SIGINT)
            if all(code == 0 for code in codes):
                return Outcome(0)
            if any(codes):
                break
            time.sleep(_POLL_S)
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s and None in self._poll():
            time.sleep(_POLL_S)
        codes = self._poll()
        ends = tuple(
            RankEnd(
                rank=rank,
                code=code,
                at_s=self._ended_s[rank],
                story=Story.read(self._meeting, rank),
                output=self._last_output(rank),
            )
            for rank, code in enumerate(codes)
            if code is not None
        )
        broken_off = (0, -signal.SIGINT, _SIGNALLED + signal.SIGINT)
        if self._num_interrupts and all(end.code in broken_off for end in ends):
            return Outcome(_SIGNALLED + signal.SIGINT)
        return Outcome(2 if 2 in codes else 1, ends)

    def _poll(self) -> list[int | None]:
        codes = [process.poll() for process in self._processes]
        for rank, code in enumerate(codes):
            if code is not None:
                self._ended_s.setdefault(rank, time.time() - _POLL_S)
        return codes

    def _last_output(self, rank: int) -> str:
        """What a crash left, and what the rank printed before it had a log."""
        texts = [
            path.read_text(errors="replace")
            for path in (self._meeting / f"{rank}.out", self._meeting / f"{rank}.crash")
            if path.exists()
        ]
        return "".join(texts).strip()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._num_interrupts += number == signal.SIGINT
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *problem: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


def environment_of_rank(here: Mapping[str, str], rank: int, ranks: int) -> dict[str, str]:
    """What a rank gets of this process's environment, and its own place among the others.

    Left out is what another launcher has said of its ranks; what would bind the threads of several
    ranks to the same cores; and a network interface that this machine does not have.
    """
    interfaces = {name for _, name in socket.if_nameindex()}

    def is_of_use(name: str, value: str) -> bool:
        if name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"):
            return not interfaces.isdisjoint(value.split(","))
        if name == "NCCL_SOCKET_IFNAME" and not value.startswith("^"):  # beginnings of names
            wanted = tuple(value.removeprefix("=").split(","))
            return any(interface.startswith(wanted) for interface in interfaces)
        return not is_of_a_launcher(name) and not (ranks > 1 and pins_threads(name))

    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    kept = {name: value for name, value in here.items() if is_of_use(name, value)}
    return {**kept, **{name: str(number) for name, number in place.items()}}


def print_error(text: str) -> None:
    """Tell the user; a terminal that was closed hears nothing."""
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr, flush=True)
