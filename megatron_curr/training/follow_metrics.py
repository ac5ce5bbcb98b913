"""Sends the rows of ``metrics.jsonl`` to TensorBoard or Weights & Biases, in a process of its own.

    python -m megatron_curr.training.follow_metrics KIND RUN_FOLDER INCARNATION RESUMED_TOKENS

The trainer starts it (``loggers.py``) and shares nothing with it but the file: a server that does
not answer, a disk without room, a library that hangs or ends stop this process and nothing else.
Its standard input ends with the trainer; what is in the file then is still sent. What has been sent
stands in ``logs/KIND.json``, so that the next one goes on there: a row is neither lost nor sent
twice, also where a resumed run takes steps again whose rows have been sent.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from megatron_curr.curriculum.ledger import read_ledger
from megatron_curr.durable import write_durably
from megatron_curr.incarnation.record import Incarnation
from megatron_curr.recipe.load import load_recipe, recipe_fingerprint

END_WITHIN_S = 60  # after the trainer's end
_POLL_S = 1.0
_LOCK_WITHIN_S = 90.0  # for the one of the start before to end
_ROWS_AT_ONCE = 1000
_HEAD_BYTES, _BLOCK_BYTES = 7, 32_768
_NUMBERS_A_TOKEN = 8  # rows of one token, and late ones of saves, which fit between two steps


@dataclass
class Progress:
    """What a logger has of a run. ``sent`` is the last token of every kind of row (``area_of``)."""

    id: str = field(default_factory=lambda: secrets.token_hex(4))
    last_number: int = -1
    sent: dict[str, int] = field(default_factory=dict)
    ledger_head: str = ""
    fingerprint: str = ""
    open_folder: str = ""  # of W&B's offline run that was not closed: ``sent`` is without its rows

    @classmethod
    def read(cls, path: Path) -> Progress:
        """As saved; a new one where there is none."""
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def save(self, path: Path) -> None:
        """Keep it."""
        write_durably(path, json.dumps(asdict(self)) + "\n")

    def forget_after(self, tokens: int) -> None:
        """Rows after this token are to be sent (again)."""
        self.sent = {area: min(last, tokens) for area, last in self.sent.items()}

    def note(self, row: dict[str, Any]) -> bool:
        """Whether a row has to be sent; it counts as sent from now on.

        ``last_number`` is then its own: it grows, and says the tokens, so that a step that is taken
        again has the same.
        """
        area, tokens = area_of(row), int(row["consumed_tokens"])
        if tokens <= self.sent.get(area, -1):
            return False
        self.sent[area] = tokens
        self.last_number = max(_NUMBERS_A_TOKEN * tokens, self.last_number + 1)
        return True


def area_of(row: dict[str, Any]) -> str:
    """What kind of row it is, by its first metric: train, eval, checkpoint, run."""
    return next((name.partition("/")[0] for name in row if "/" in name), "")


def values_of(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, without its clock."""
    return {
        name: value
        for name, value in row.items()
        if "/" in name and isinstance(value, int | float) and not isinstance(value, bool)
    }


class Sink(Protocol):
    """What rows are sent to. ``url`` is where a person sees them, where there is such a place."""

    url: str
    open_folder: str

    def write(self, row: dict[str, Any], number: int) -> None:
        """Take one row; ``number`` grows."""

    def flush(self) -> bool:
        """Let others see what was taken; whether all of it is safe now."""

    def close(self) -> None:
        """Flush and let go."""


class TensorBoard:
    """Scalars by consumed tokens; earlier files no longer count from ``purge_from`` on."""

    url = open_folder = ""

    def __init__(self, folder: Path, *, purge_from: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(folder))
        began = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(
            self._event(wall_time=time.time(), step=purge_from, session_log=began)
        )

    def write(self, row: dict[str, Any], number: int) -> None:
        """Every number of the row."""
        value = self._summary.Value
        values = [value(tag=name, simple_value=number) for name, number in values_of(row).items()]
        self._writer.add_event(
            self._event(
                wall_time=row["time_s"],
                step=row["consumed_tokens"],
                summary=self._summary(value=values),
            )
        )

    def flush(self) -> bool:
        """To the file."""
        self._writer.flush()
        return True

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def cut_tensorboard(folder: Path, tokens: int) -> None:
    """Let TensorBoard show nothing after a token of what is in the folder, if anything is."""
    if folder.is_dir():
        TensorBoard(folder, purge_from=tokens + 1).close()


class Wandb:
    """A W&B run, found again by ``run_id``.

    Its step is the number of the row: of rows that are sent again because nobody knows whether
    W&B has them, it takes those with a higher step than its last.
    """

    def __init__(self, *, project: str, name: str, run_id: str, folder: Path, config: Any) -> None:
        for inherited in ("WANDB_SERVICE", "WANDB_RUN_ID", "WANDB_RESUME"):  # of another run
            os.environ.pop(inherited, None)
        os.environ.setdefault("WANDB_INIT_TIMEOUT", "30")
        import wandb

        self._run = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=str(folder.resolve()),
            config=config,
            settings=wandb.Settings(console="off"),
        )
        self.url = self._run.url or ""
        here = Path(self._run.dir).parent
        self.open_folder = str(here.relative_to(folder.resolve())) if self._run.offline else ""
        self._run.define_metric("consumed_tokens")
        self._run.define_metric("*", step_metric="consumed_tokens")

    def write(self, row: dict[str, Any], number: int) -> None:
        """The row's numbers together with the clock."""
        clock = {"consumed_tokens": row["consumed_tokens"], "train_step": row["step"]}
        self._run.log({**clock, **values_of(row)}, step=number, commit=True)

    def flush(self) -> bool:
        """Ask W&B's service, which is a process of its own, whether the server has all.

        Offline there is none, and what has reached the file is known when that is closed.
        """
        return not self._run.status().sync_items_pending and not self._run.offline

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def follow(path: Path, sink: Sink, progress: Progress, *, state: Path, pen: Path) -> None:
    """Send rows as they come, until the trainer has gone or a successor has taken its ``pen``."""
    with path.open("rb") as stream:
        has_gone = False
        while not has_gone:
            has_gone = bool(select.select([sys.stdin], [], [], _POLL_S)[0])
            if has_gone:
                signal.alarm(END_WITHIN_S)
            for rows in _new_rows(stream):
                if not pen.is_dir():
                    has_gone = True
                    break
                for row in rows:
                    if progress.note(row):
                        sink.write(row, progress.last_number)
                if sink.flush():
                    progress.save(state)
    sink.close()
    progress.open_folder = ""
    progress.save(state)


def _new_rows(stream: Any) -> Iterator[list[dict[str, Any]]]:
    """Whole lines that have been appended, some at a time; one that is torn waits for its end."""
    while True:
        rows: list[dict[str, Any]] = []
        while len(rows) < _ROWS_AT_ONCE:
            begin = stream.tell()
            line = stream.readline()
            if not line.endswith(b"\n"):
                stream.seek(begin)
                break
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        if not rows:
            return
        yield rows


def rows_of_offline_run(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows in the file of one of W&B's offline runs, which may end in the middle of a row.

    The files are LevelDB logs of protocol buffers: blocks of 32 KiB, in them records with a head of
    seven bytes (checksum, size, and whether it is whole or which part of a longer one it is).
    """
    for file in folder.glob("*.wandb"):
        from wandb.proto import wandb_internal_pb2

        data, offset, held = file.read_bytes(), _HEAD_BYTES, b""
        while offset + _HEAD_BYTES <= len(data):
            left = _BLOCK_BYTES - offset % _BLOCK_BYTES
            if left < _HEAD_BYTES:
                offset += left
                continue
            _, size, part = struct.unpack_from("<IHB", data, offset)
            offset += _HEAD_BYTES + size
            if offset > len(data):
                break
            held += data[offset - size : offset]
            if part not in (1, 4):  # the first or a middle part
                continue
            record = wandb_internal_pb2.Record()
            record.ParseFromString(held)
            held = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                yield {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}


def build_sink(kind: str, run_folder: Path, progress: Progress, resumed_tokens: int) -> Sink:
    """The sink, standing where ``progress`` says."""
    logs = run_folder / "logs"
    if kind == "tensorboard":
        last = max(progress.sent.values(), default=-1)
        progress.forget_after(resumed_tokens)
        return TensorBoard(logs / kind, purge_from=min(last, resumed_tokens) + 1)
    recipe = load_recipe(run_folder / "recipe.yaml")
    return Wandb(
        project=str(recipe.logging.wandb_project),
        name=recipe.name,
        run_id=f"{recipe.name}-{progress.id}",
        folder=logs,
        config=recipe.model_dump(mode="json", by_alias=True),
    )


def main(kind: str, run_folder: Path, incarnation: int, resumed_tokens: int) -> None:
    """Follow the metrics of one start of a run. ``resumed_tokens`` is -1 for one from nothing."""
    logs = run_folder / "logs"
    with (logs / f".{kind}.lock").open("w") as lock:
        _wait_to_be_alone(lock)
        state = logs / f"{kind}.json"
        progress = Progress.read(state)
        if progress.open_folder:
            for row in rows_of_offline_run(logs / progress.open_folder):
                progress.note(row)
        _forget_what_is_replaced(progress, run_folder, is_new=resumed_tokens < 0)
        progress.save(state)  # the id, above all, before anybody hears of it
        sink = build_sink(kind, run_folder, progress, resumed_tokens)
        progress.open_folder = sink.open_folder
        progress.save(state)
        say(ready=sink.url)
        pen = Incarnation(run_folder / "incarnations" / f"{incarnation:04d}").pen
        follow(run_folder / "metrics.jsonl", sink, progress, state=state, pen=pen)


def _forget_what_is_replaced(progress: Progress, run_folder: Path, *, is_new: bool) -> None:
    """Rows that were sent of a future that an amendment or another recipe has replaced."""
    entries = read_ledger(run_folder / "ledger.jsonl")
    hashes = [entry.hash for entry in entries]
    known = hashes.index(progress.ledger_head) + 1 if progress.ledger_head in hashes else 0
    for entry in entries[known:]:
        progress.forget_after(entry.edition.from_tokens)
    fingerprint = recipe_fingerprint(load_recipe(run_folder / "recipe.yaml"))
    if is_new and progress.fingerprint != fingerprint:
        progress.forget_after(-1)
    progress.ledger_head, progress.fingerprint = hashes[-1], fingerprint


def _wait_to_be_alone(lock: IO[str]) -> None:
    """Until the one before has sent what its trainer left; not where locks do not work."""
    until_s = time.monotonic() + _LOCK_WITHIN_S
    while time.monotonic() < until_s:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(_POLL_S)
        except OSError:
            return


def say(**facts: str) -> None:
    """Tell the trainer, if it is still there."""
    with contextlib.suppress(OSError):
        os.write(sys.stdout.fileno(), json.dumps(facts).encode() + b"\n")


if __name__ == "__main__":
    kind, run_folder, incarnation, resumed_tokens, *again = sys.argv[1:]
    try:
        main(kind, Path(run_folder), int(incarnation), int(resumed_tokens))
    except Exception as error:
        # W&B's service ends at the signals that Slurm sends to all processes of a step, and cannot
        # be kept from it. Here they are blocked and wait: begin anew once, with all that is left.
        if not again and signal.sigpending():
            os.execv(sys.executable, [*sys.orig_argv, "again"])
        reason = str(error).strip().partition("\n")[0]
        say(failed=f"{type(error).__name__}: {reason}")
        raise
