"""``megatron-curr convert``: open, write, compare, tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_curr.convert.export import Export, export
from megatron_curr.convert.import_model import Import, import_model
from megatron_curr.convert.source import Source, Which, open_source
from megatron_curr.convert.stored import METADATA
from megatron_curr.convert.verify import Agreement, reason_not_to_verify, verify
from megatron_curr.errors import RecipeError


@dataclass(frozen=True)
class Conversion:
    """What was written, and how near it is to what was read."""

    folder: Path
    source: Path
    architecture: str
    num_parameters: int
    size_bytes: int
    passed_over: tuple[str, ...]  # torn checkpoints newer than the one converted
    notes: tuple[str, ...]  # what of the source is not in it, or not as it was
    agreement: Agreement | None
    verdict: str


def run_conversion(
    path: Path,
    output: Path,
    *,
    to: Literal["hf", "checkpoint"] | None = None,
    dtype: str | None = None,
    architecture: str | None = None,
    chat_template: Path | None = None,
    verify: bool | None = None,
    trust_pickle: bool = False,
    which: Which = "raw",
) -> Conversion:
    """Convert ``path``, and compare the two models unless told not to or they do not fit.

    Raises a ``UserError`` and leaves nothing behind when anything is wrong, the models' agreement
    included.
    """
    source = open_source(path, trust_pickle=trust_pickle, which=which)
    return convert_source(
        source,
        output,
        to=to or ("hf" if (source.path / METADATA).is_file() else "checkpoint"),
        dtype=dtype,
        architecture=architecture,
        chat_template=chat_template,
        verify=verify,
    )


def convert_source(
    source: Source,
    output: Path,
    *,
    to: Literal["hf", "checkpoint"],
    dtype: str | None = None,
    architecture: str | None = None,
    chat_template: Path | None = None,
    verify: bool | None = None,
) -> Conversion:
    """As ``run_conversion``, of what is open already."""
    family = source.family(architecture)
    pieces = source.pieces(family)
    comparison = _Comparison(source, to=to)
    if verify is not False:
        reason = comparison.reason_against or reason_not_to_verify(
            source,
            num_parameters=sum(piece.num_values for piece in pieces),
            architecture=family.architecture,
        )
        if verify and reason:
            raise RecipeError(f"--verify: {reason}; leave it out to convert without comparing")
        comparison.verdict = f"not compared: {reason}" if reason else ""
    else:
        comparison.verdict = "not compared: --no-verify"
    check: Callable[[Path], None] = (
        comparison.run if not comparison.verdict else lambda folder: None
    )
    total = sum(p.num_values * source.weights.dtype(p.stored).itemsize for p in pieces)
    with progress_bar(f"{source.path.name} to {output.name}", total) as on_bytes:
        if to == "hf":
            done: Export | Import = export(
                source,
                output,
                dtype=dtype,
                architecture=architecture,
                chat_template=chat_template,
                on_bytes=on_bytes,
                check=check,
            )
        else:
            if chat_template is not None:
                raise RecipeError(
                    "--chat-template: is for --to hf, a checkpoint has none; leave it out"
                )
            done = import_model(source, output, dtype=dtype, on_bytes=on_bytes, check=check)
    return Conversion(
        folder=done.folder,
        source=done.source,
        architecture=done.architecture,
        num_parameters=done.num_parameters,
        size_bytes=done.size_bytes,
        passed_over=source.run.passed_over if source.run else (),
        notes=done.notes,
        agreement=comparison.agreement,
        verdict=comparison.verdict,
    )


class _Comparison:
    """Shows both models the same tokens, where one is a checkpoint and one a published folder."""

    def __init__(self, source: Source, *, to: Literal["hf", "checkpoint"]) -> None:
        self.source = source
        self.agreement: Agreement | None = None
        self.verdict = ""
        is_checkpoint = (source.path / METADATA).is_file()
        self.reason_against: str | None = None
        if source.made_by:
            self.reason_against = f"there is no second model, it is {source.made_by}"
        elif is_checkpoint == (to == "checkpoint"):
            self.reason_against = f"both sides are a {to} folder"
        self.to = to

    def run(self, folder: Path) -> None:
        """Raises ``CheckpointError`` when they are not one model."""
        published, checkpoint = folder, self.source.path
        if self.to == "checkpoint":
            published, checkpoint = self.source.path, folder
        self.agreement = verify(published, checkpoint, self.source)
        self.verdict = str(self.agreement)


@contextmanager
def progress_bar(title: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal; nothing in a log, which the outcome is written to."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=total_bytes)
        yield lambda count: progress.advance(task, count)
