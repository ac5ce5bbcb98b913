"""What one rank knows about the incarnation it is part of: its pen, its clock, its last word."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil

from megatron_curr.errors import UserError
from megatron_curr.incarnation.conclude import conclude_one
from megatron_curr.incarnation.fence import Fenced, Pen, claim_run
from megatron_curr.incarnation.record import CAUSES, Beat, Claim, Ending, Incarnation, incarnations
from megatron_curr.training.run_folder import RunFolder, RunLock

log = logging.getLogger(__name__)

BEAT_EVERY_S = 5.0
_STEPS_REMEMBERED = 50
# Parts of what gloo, NCCL and torch's store say when another rank has gone.
_LOST_CONTACT = ("connection", "broken pipe", "timed out", "timeout", "socket", "gloo", "nccl")


class RunFailed(RuntimeError):
    """A run cannot go on, for a reason its message tells in full: no traceback is needed.

    ``cause`` is one of ``incarnation.record.CAUSES``; ``bad_nodes`` are to be avoided.
    """

    is_plain = True
    cause = "error"

    def __init__(self, text: str, *, bad_nodes: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.bad_nodes = bad_nodes


class NoMeeting(RunFailed):
    """Not all ranks came to the rendezvous."""

    cause = "no-meeting"


def lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank has gone."""
    said = str(error).lower()
    is_of_torch = isinstance(error, RuntimeError) and not getattr(error, "is_plain", False)
    return is_of_torch and any(part in said for part in _LOST_CONTACT)


class Life:
    """One rank's part of an incarnation, from the claim to the last word."""

    def __init__(
        self, incarnation: Incarnation, *, rank: int, node: str, is_first_on_node: bool = True
    ) -> None:
        self.incarnation = incarnation
        self.pen = Pen(incarnation.pen)
        self.checkpoint_pen = Pen(incarnation.checkpoint_pen)
        self.rank = rank
        self.node = node
        self.is_first_on_node = is_first_on_node
        self.lock: RunLock | None = None
        self.stage = "meet"
        self.stage_began_s = time.monotonic()
        self.times_s: dict[str, float] = {}
        self.step = 0
        self.steps_s: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def enter(self, stage: str) -> float:
        """The rank does something else now; how long it did what it did before, in seconds."""
        now_s = time.monotonic()
        spent_s = now_s - self.stage_began_s
        self.times_s[self.stage] = self.times_s.get(self.stage, 0.0) + spent_s
        self.stage, self.stage_began_s = stage, now_s
        return spent_s

    @contextmanager
    def spending(self, stage: str) -> Iterator[None]:
        """Count the time inside as the stage's; then go on with what was before."""
        before = self.stage
        self.enter(stage)
        try:
            yield
        finally:
            self.enter(before)

    def step_ended(self, step: int) -> None:
        """A step is computed; its time is remembered."""
        self.steps_s.append(self.enter("other"))
        self.step = step

    @property
    def step_time_s(self) -> float | None:
        """Median of the last steps."""
        return median(self.steps_s) if self.steps_s else None

    def write_beat(self, beat: Beat) -> None:
        """Rank 0 tells how far the run is; a full disk is no reason to stop."""
        path = self.incarnation.folder / "beat.json"
        partial = path.with_name(".beat.json.partial")
        try:
            partial.write_text(beat.to_json(), encoding="utf-8")
            partial.replace(path)
        except OSError as error:
            log.debug("no beat: %s", error)

    def end(
        self,
        cause: str,
        detail: str,
        *,
        is_echo: bool = False,
        bad_nodes: tuple[str, ...] = (),
    ) -> None:
        """Leave this rank's word about its end; the last one stands."""
        ending = Ending(
            rank=self.rank,
            node=self.node,
            at_s=time.time(),
            cause=cause,
            detail=detail,
            is_echo=is_echo,
            stage=self.stage,
            step=self.step,
            bad_nodes=bad_nodes,
        )
        try:
            self.incarnation.leave_word(ending)
        except OSError as error:
            log.warning("the end of this rank could not be recorded: %s", error)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what ends this rank when it is an error."""
        try:
            yield
        except BaseException as error:  # who calls sys.exit has failed as well
            self.end_by(error)
            raise

    def end_by(self, error: BaseException) -> None:
        """Leave word of an error."""
        text = (str(error) or type(error).__name__).strip()
        if isinstance(error, Fenced):
            self.end("fenced", text)
        elif isinstance(error, RunFailed):
            self.end(error.cause, text, bad_nodes=error.bad_nodes)
        elif isinstance(error, UserError):
            self.end("wrong-input", text)
        elif lost_contact(error):
            where = f"rank {self.rank} on {self.node} lost contact with others at step {self.step}"
            self.end("lost-rank", f"{where} ({text.splitlines()[0]})", is_echo=True)
        else:
            first = text.splitlines()[0]
            place = f"rank {self.rank} on {self.node}"
            self.end(f"error:{type(error).__name__}", f"{place}: {type(error).__name__}: {first}")

    def conclude(self, run_folder: Path, cause: str, detail: str) -> None:
        """On rank 0, at a clean end: its word and the whole's record; lets go of the folder."""
        assert cause.partition(":")[0] in CAUSES
        self.end(cause, detail)
        conclude_one(run_folder, self.incarnation)
        if self.lock is not None:
            self.lock.release()


def begin_life(folder: RunFolder, *, world_size: int = 1, node: str | None = None) -> Life:
    """On rank 0: lock the run folder and claim it, before anything is written there.

    Raises ``CheckpointError`` where another run holds it. An incarnation of the same chain that
    still lives is stale: it is fenced, its lock is passed over.
    """
    host = socket.gethostname()
    started_at_s = psutil.Process().create_time()
    job_id = os.environ.get("SLURM_JOB_ID")
    chain = os.environ.get("MEGATRON_CURR_CHAIN") or job_id or f"{host}-{os.getpid()}-{time.time()}"
    newest = [incarnation.claim for incarnation in incarnations(folder.path)[-1:]]
    is_ours = any(claim is not None and claim.chain == chain for claim in newest)
    lock = folder.lock(takes_over=is_ours)
    now_s = time.time()
    submitted_s = os.environ.get("MEGATRON_CURR_SUBMITTED_S")
    launched_s = os.environ.get("MEGATRON_CURR_LAUNCHED_S")

    def make_claim(number: int) -> Claim:
        return Claim(
            incarnation=number,
            chain=chain,
            host=host,
            pid=os.getpid(),
            num_ranks=world_size,
            job_id=job_id,
            restart=int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            submitted_at_s=float(submitted_s) if submitted_s else None,
            launched_at_s=float(launched_s) if launched_s else started_at_s,
            started_at_s=started_at_s,
            claimed_at_s=now_s,
        )

    life = Life(claim_run(folder.path, make_claim), rank=0, node=node or host)
    life.times_s["imports"] = now_s - started_at_s
    life.lock = lock
    return life


def join_life(
    folder: RunFolder, number: int, *, rank: int, node: str, is_first_on_node: bool
) -> Life:
    """On the other ranks: part of the incarnation that rank 0 has claimed."""
    incarnation = Incarnation(folder.path / "incarnations" / f"{number:04d}")
    return Life(incarnation, rank=rank, node=node, is_first_on_node=is_first_on_node)
