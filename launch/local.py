"""Start a run's ranks as processes on this machine, and look after them.

Input is checked here, before any rank starts, so that a mistake is told once and costs a second.
Ranks meet in a file (no ports) and die with this process. The first rank to fail takes the others
down, and its story is told first. Stop signals are passed on.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType

from megatron_curr.incarnation.conclude import conclude
from megatron_curr.incarnation.record import incarnations
from megatron_curr.incarnation.surroundings import is_of_a_launcher, pins_threads
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.training.preflight import prepare
from megatron_curr.training.signals import STOP_SIGNALS

_POLL_S = 0.05
_GRACE_S = 1.0  # for ranks that fail because another did, to leave their story too
_INTERRUPTED = 130


def launch_training(
    recipe_path: str | Path,
    overrides: Sequence[str] = (),
    ranks: int = 1,
    *,
    stop_at_tokens: int | None = None,
) -> int:
    """Train on ``ranks`` processes; the exit code: 0 complete or stopped, 1 failed, 2 input.

    Raises ``UserError`` for what is wrong before any rank starts; nothing is written then.
    """
    recipe = load_recipe(recipe_path, overrides)
    folder = prepare(recipe, ranks).folder
    folder.check_free()
    with TemporaryDirectory(prefix="megatron-curr-") as name:
        meeting = Path(name)
        resolved = meeting / "recipe.yaml"
        resolved.write_text(dump_recipe(recipe), encoding="utf-8")
        arguments = [str(resolved), "--rendezvous", f"file://{meeting}/store"]
        arguments += ["--failures", str(meeting), "--parent", str(os.getpid())]
        if stop_at_tokens is not None:
            arguments += ["--stop-at", str(stop_at_tokens)]
        crew = Crew(arguments, ranks, meeting)
        with crew:
            code = crew.wait()
    newest = incarnations(folder.path)[-1:]
    if any(incarnation.claim and incarnation.claim.pid in crew.pids for incarnation in newest):
        conclude(folder.path)
    return code


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
        self._processes = [self._start(arguments, rank, ranks) for rank in range(ranks)]
        self.pids = {process.pid for process in self._processes}
        self._handlers = {number: signal.signal(number, self._pass_on) for number in STOP_SIGNALS}

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

    def wait(self) -> int:
        """Wait for the ranks; at the first failure end the others and tell the user."""
        while True:
            codes = [process.poll() for process in self._processes]
            if self._num_interrupts > 1:
                return _INTERRUPTED
            if all(code == 0 for code in codes):
                return 0
            if any(codes):
                break
            time.sleep(_POLL_S)
        self._wait_for_stories()
        failed = {rank: code for rank, code in enumerate(codes) if code}
        stories = [json.loads(path.read_text()) for path in self._meeting.glob("*.json")]
        if not stories:
            rank, code = next(iter(failed.items()))
            _print_error(f"rank {rank} {_ending(code)}{self._last_output(rank)}")
            return 1
        first = min(stories, key=lambda story: (not story["is_expected"], story["time_s"]))
        heading = "" if first["is_expected"] else f"rank {first['rank']} failed:\n"
        _print_error(f"{heading}{first['story']}")
        return 2 if 2 in failed.values() else 1

    def _wait_for_stories(self) -> None:
        deadline_s = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline_s and any(p.poll() is None for p in self._processes):
            time.sleep(_POLL_S)

    def _last_output(self, rank: int) -> str:
        path = self._meeting / f"{rank}.out"
        text = path.read_text(errors="replace").strip() if path.exists() else ""
        return f":\n{text}" if text else ""

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
        return not is_of_a_launcher(name) and not (ranks > 1 and pins_threads(name))

    place = {"RANK": rank, "WORLD_SIZE": ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": ranks}
    kept = {name: value for name, value in here.items() if is_of_use(name, value)}
    return {**kept, **{name: str(number) for name, number in place.items()}}


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    return f"was killed by {signal.Signals(-code).name}" + (
        " (out of memory?)" if code == -signal.SIGKILL else ""
    )


def _print_error(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
