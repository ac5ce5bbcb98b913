"""The run folder: one place for everything a run writes, one run at a time. No torch here.

``recipe.yaml`` (resolved), ``ledger.jsonl``, ``data.json``, ``metrics.jsonl``, ``checkpoints/``,
``logs/``, ``incarnations/`` and ``lock``; of video, ``encoders.json``. A folder with checkpoints is
resumed; the recipe may then differ only in what does not decide what is trained.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megatron_curr.curriculum.ledger import (
    Entry,
    hold_ledger,
    open_ledger,
    read_ledger,
    recipe_after,
)
from megatron_curr.data.identity import FILE_NAME as DATA_FILE
from megatron_curr.data.identity import (
    Files,
    KnownData,
    check_tokenizer_unchanged,
    check_unchanged,
    read_known,
)
from megatron_curr.durable import write_durably
from megatron_curr.errors import CheckpointError, UserError
from megatron_curr.incarnation.fence import Pen
from megatron_curr.recipe.load import (
    MAY_CHANGE_ON_RESUME,
    RUN_LEDGER,
    RUN_RECIPE,
    AnyRecipe,
    Difference,
    dump_recipe,
    load_recipe,
    recipe_differences,
)
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training.checkpoint_folder import (
    RunState,
    list_checkpoints,
    read_state,
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run, and the rules for coming back to it."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / RUN_RECIPE

    @property
    def ledger(self) -> Path:
        """Which curriculum was valid from which token on."""
        return self.path / RUN_LEDGER

    @property
    def encoders(self) -> Path:
        """Digests of the codec and text encoder that a video run began with."""
        return self.path / "encoders.json"

    @property
    def metrics(self) -> Path:
        """One JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are saved."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """A folder an incarnation, in it a file a rank."""
        return self.path / "logs"

    def rank_log(self, incarnation: int, rank: int) -> Path:
        """The log of one rank in one start of the run."""
        return self.logs / f"{incarnation:04d}" / f"rank_{rank}.log"

    def resume_command(self, num_ranks: int) -> str:
        """What to type to go on, as a shell reads it."""
        return f"megatron-curr train {shlex.quote(str(self.path))} --ranks {num_ranks}"

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is something to resume."""
        return bool(list_checkpoints(self.checkpoints))

    def check_checkpoints(self) -> None:
        """Raise ``CheckpointError`` where ``checkpoints`` is a link that leads nowhere."""
        if self.checkpoints.is_symlink() and not self.checkpoints.is_dir():
            raise CheckpointError(
                f"{self.checkpoints} is a link to {self.checkpoints.readlink()}, where there is no "
                "folder; make it, mount its disk, or remove the link"
            )

    def newest_state(self) -> RunState | None:
        """The newest readable ``state.json``; whether its tensors are whole is not looked at."""
        for checkpoint in reversed(list_checkpoints(self.checkpoints)):
            try:
                return read_state(checkpoint)
            except (OSError, ValueError, TypeError):
                continue
        return None

    def under_ledger(self, recipe: AnyRecipe) -> AnyRecipe:
        """The recipe as the run has it now, where it is the one from before an amendment.

        The command that started a run goes on with it: what is planned says the ledger. A
        curriculum that the run never had is left as it is, for ``check_recipe`` to refuse.
        """
        try:
            ledger, known = read_ledger(self.ledger), load_recipe(self.recipe)
        except UserError:  # not started yet, or damaged: said where it is needed
            return recipe
        *earlier, newest = (entry.edition.curriculum for entry in ledger)
        if recipe.curriculum == newest or recipe.curriculum not in earlier:
            return recipe
        if type(recipe) is not type(known):
            return recipe
        values = recipe.model_dump(mode="json", by_alias=True)["data"]["sources"]
        ours = known.model_dump(mode="json", by_alias=True)["data"]["sources"]
        if any(values[name] != ours.get(name) for name in values):
            return recipe
        return recipe_after(recipe, ledger)

    def check_recipe(self, recipe: Recipe) -> list[Difference]:
        """What changed since the run was last started, all of it allowed.

        Raises ``CheckpointError`` listing what may not change between a save and its resume.
        """
        if not self.has_checkpoints:
            return []
        changes = recipe_differences(load_recipe(self.recipe), recipe)
        refused = [change for change in changes if not change.allowed]
        if refused:
            raise CheckpointError(
                f"{self.recipe}: the run was started with another recipe:\n"
                + "\n".join(f"  {change}" for change in refused)
                + "\n  What may change on resume: "
                + ", ".join(MAY_CHANGE_ON_RESUME)
                + "\n  The curriculum ahead, and sources, change with: "
                f"megatron-curr amend {shlex.quote(str(self.path))} RECIPE"
            )
        return changes

    def check_sources(self, source_tokens: dict[str, int]) -> None:
        """Raise ``CheckpointError`` when a source's shards are not those the run began with."""
        state = self.newest_state()
        for name, source in state.sources.items() if state else ():
            found = source_tokens.get(name)
            if found is not None and found != source.num_tokens:
                raise CheckpointError(
                    f"data.sources.{name}: its shards held {source.num_tokens:,} tokens when the "
                    f"run was saved and hold {found:,} now, so samples would not be those planned; "
                    "put the old shards back, or start a new run under another name"
                )

    def check_encoders(self, found: Mapping[str, str]) -> None:
        """Raise ``CheckpointError`` when codec or text encoder are not those the run began with."""
        if not self.has_checkpoints or not self.encoders.is_file():
            return
        known = json.loads(self.encoders.read_text(encoding="utf-8"))
        for what, digest in found.items():
            if known[what] != digest:
                raise CheckpointError(
                    f"data.sources: the shards were made with another {what}, or other settings of "
                    "it, than when the run was saved, so its model would not know what it sees; "
                    "put the old shards back, or start a new run under another name"
                )

    def check_data(self, files: Files, tokenizer_sha256: str | None) -> None:
        """Raise ``CheckpointError`` when shards or tokenizer are not those the run began with."""
        known = read_known(self.path) if self.has_checkpoints else None
        if known is not None:
            remedy = "put back what was there, or start a new run under another name"
            check_tokenizer_unchanged(known, tokenizer_sha256, remedy=remedy)
            check_unchanged(known, files, remedy=remedy)

    def add_data(self, found: KnownData | None) -> None:
        """Write down the sources that an amendment brings, beside those already known."""
        known = read_known(self.path)
        if known is not None and found is not None:
            write_durably(self.path / DATA_FILE, known.with_others(found).text())

    def read_ledger(self, recipe: Recipe) -> tuple[Entry, ...]:
        """The run's ledger; for a run that starts now, the one its recipe opens.

        One that was amended before its first checkpoint keeps its ledger with the amended recipe.
        """
        if self.has_checkpoints:
            return read_ledger(self.ledger)
        with contextlib.suppress(CheckpointError):
            known = read_ledger(self.ledger)
            if known[-1].edition.curriculum == recipe.curriculum:
                return known
        return open_ledger(recipe.curriculum)

    def write_records(
        self,
        recipe: Recipe,
        ledger: Sequence[Entry],
        pen: Pen,
        *,
        encoders: Mapping[str, str] | None = None,
        data: KnownData | None = None,
    ) -> None:
        """Put the recipe and the data of this start, and for a new run its ledger, on disk."""
        try:
            for folder in (self.checkpoints, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            pen.write(self.recipe, dump_recipe(recipe))
            if not self.has_checkpoints:
                self._write_ledger("".join(entry.line() + "\n" for entry in ledger), pen)
            if encoders:
                pen.write(self.encoders, json.dumps(encoders) + "\n")
            if data:
                if self.has_checkpoints and (known := read_known(self.path)):
                    data = data.with_others(known)  # an amendment may have come meanwhile
                pen.write(self.path / DATA_FILE, data.text())
        except OSError as error:
            raise _unwritable(self.path, error) from None

    def _write_ledger(self, text: str, pen: Pen) -> None:
        """Open the ledger, unless it is the same one, perhaps amended since it was read."""
        with hold_ledger(self.ledger):
            known = self.ledger.read_text(encoding="utf-8") if self.ledger.is_file() else ""
            if not known.startswith(text):
                pen.write(self.ledger, text)

    def lock(self, *, takes_over: bool = False) -> RunLock:
        """Hold the folder against every other run; released when the process ends.

        ``takes_over``: whoever holds it is known to be stale, and keeps a lock on nothing.
        """
        return RunLock(self.path / "lock", takes_over=takes_over)

    def check_free(self) -> None:
        """Raise ``CheckpointError`` when a run holds the folder now. Writes nothing."""
        lock = self.path / "lock"
        if not lock.exists():
            return
        with lock.open("r") as stream:
            _seize(stream.fileno(), lock)


class RunLock:
    """An advisory lock that the kernel drops with its holder, so it is never left behind."""

    def __init__(self, path: Path, *, takes_over: bool = False) -> None:
        """Raises ``CheckpointError`` naming the holder when another run has it."""
        self._descriptor: int | None = None
        own = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        opened = own if takes_over else path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(opened, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise _unwritable(path.parent, error) from None
        try:
            _seize(self._descriptor, path)
        except CheckpointError:
            self._close()
            raise
        os.ftruncate(self._descriptor, 0)
        job = f"job {os.environ['SLURM_JOB_ID']}, " if "SLURM_JOB_ID" in os.environ else ""
        os.pwrite(
            self._descriptor, f"{job}pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0
        )
        if takes_over:
            own.replace(path)
        # A forked child shares the lock and would hold it past the end of its parent.
        os.register_at_fork(after_in_child=self._close)

    def release(self) -> None:
        """Let go; harmless when already done."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # for forked children, too
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _seize(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = path.read_text(encoding="utf-8").strip() or "an unknown process"
        raise CheckpointError(
            f"{path.parent}: this run folder is already in use by {holder}; wait for that run, "
            "stop it, or give this one another name or run_folder"
        ) from None


def _unwritable(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the run folder cannot be written ({error.strerror}: {error.filename}); "
        "set run_folder to a place you may write to, with room on its disk"
    )
