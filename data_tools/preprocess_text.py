"""Turn a corpus into the indexed shards of one source, and a held-out part of them.

``OUT/train`` and ``OUT/heldout`` get ``.bin/.idx`` shards, each with a document table, and a
``manifest.json``; rows that are no document are listed in ``OUT/rejects.jsonl``. All work happens
in ``OUT.partial``: units of the corpus first, in any order, by any number of workers or array
tasks; then the shards, cut from the units in order. A killed run goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.corpus import Unit, plan_units
from data_tools.documents import Preparation
from data_tools.engine_choice import Verdict
from data_tools.input_files import find_files
from data_tools.options import Options, RunSettings
from data_tools.progress import ReadProgress
from data_tools.publish import make_shards
from data_tools.rejections import Tally, check_rejects, check_rejects_so_far, tally_of, told
from data_tools.rows import DamagedFile
from data_tools.sampling import check_engine
from data_tools.staging import (
    SPLITS,
    check_free,
    discard,
    locked,
    publish,
    staging_of,
    trouble_told,
)
from data_tools.unit_work import (
    COUNTERS,
    RECORD,
    REJECTS,
    Job,
    UnitRecord,
    total,
    warm_up,
    work_on_unit,
)
from data_tools.unknown_text import Unknown, check_unknown
from data_tools.workers import TEXT_PRELOAD, Workers
from megatron_curr.data.manifest import FILE_NAME, read_manifest
from megatron_curr.data.sentencepiece_model import publishing_warning
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError
from megatron_curr.units import format_bytes

__all__ = ["Options", "RunSettings", "Summary", "preprocess"]
_LISTED = 5
_UNIT_VERSION = 3  # of what a unit holds; units of another are made again


@dataclass(frozen=True, slots=True)
class Summary:
    """What one run wrote. An array task counts what it did itself and has no shards yet."""

    folder: Path
    documents: Mapping[str, int]
    tokens: Mapping[str, int]
    rejects: Mapping[str, int]
    passed_over: Mapping[str, int]
    mended: int
    filtered: int
    duplicates: int
    heldout_frac: float
    read_bytes: int
    elapsed_s: float
    unknown: Unknown
    bos: str
    engine: str
    state: str  # "done", "already done", or "task done"
    units: int
    units_kept: int  # finished before by a run that was ended, or by an array task

    def text(self) -> str:
        """What a person wants to know of the run, in a few lines."""
        lines = [] if self.state == "done" else [f"{self.folder}: {self.state}"]
        if self.state != "task done":
            lines += [
                f"{self.folder / split}: {count:,} documents, {self.tokens[split]:,} tokens"
                for split, count in self.documents.items()
                if count
            ]
            if self.heldout_frac and not self.documents["heldout"]:
                lines.append(self._nothing_held_out())
        if self.rejects:
            lines.append(f"rejected rows: {told(self.rejects)}; listed in {self.folder / REJECTS}")
        if self.mended:
            lines.append(f"mended rows: {self.mended:,} with lone surrogates, now U+FFFD")
        if self.passed_over:
            lines.append(f"passed over: {told(self.passed_over)}")
        if self.filtered or self.duplicates:
            lines.append(f"left out: {self.filtered:,} filtered, {self.duplicates:,} duplicates")
        if self.unknown.tokens or self.unknown.characters:
            lines.append(f"text lost: {self.unknown.text()}")
        rate = self.read_bytes / max(self.elapsed_s, 1e-3) / 1e6
        kept = (
            f"; {self.units_kept:,} of {self.units:,} units were there" if self.units_kept else ""
        )
        size = format_bytes(self.read_bytes)
        lines.append(f"{size} in {self.elapsed_s:.1f} s, {rate:.1f} MB/s{kept}")
        return "\n".join(lines)

    def _nothing_held_out(self) -> str:
        count, share = self.documents["train"], self.heldout_frac
        return (
            f"{self.folder / 'heldout'}: nothing held out, so there is no such folder: "
            f"--heldout-frac {share:g} of {count:,} documents is about {count * share:.1f} and "
            "came to none; raise it, or give more documents, to evaluate on held-out text"
        )

    def json(self) -> str:
        """The same for scripts."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})


@dataclass(slots=True)
class Run:
    """One call of ``preprocess``: what it is to do and how far it is."""

    output: Path
    files: Sequence[Path]
    passed_over: Mapping[str, int]
    units: Sequence[Unit]
    tokenizer: Tokenizer
    options: Options
    settings: RunSettings
    preparation: Preparation
    progress: ReadProgress
    verdict: Verdict | None = None
    units_kept: int = 0
    tally: Tally = field(default_factory=Tally)  # of the units that were there
    damaged: list[str] = field(default_factory=list)

    @property
    def staging(self) -> Path:
        return staging_of(self.output)

    @property
    def unit_folder(self) -> Path:
        return self.staging / "units"

    @property
    def plan_key(self) -> str:
        """What the shards are made of and how; where the files lie and when they changed is not
        part of it, so that a copy of a corpus gives the same bytes."""
        content = [
            [(span.file, span.first, span.end, span.num_bytes) for span in unit.spans]
            for unit in self.units
        ]
        parts = [content, self.options.record(), self.tokenizer.sha256]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def missing(self) -> list[int]:
        """Numbers of the units that are not finished."""
        return [
            number
            for number, unit in enumerate(self.units)
            if not (self.unit_folder / unit.key / RECORD).is_file()
        ]


def preprocess(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    tokenizer: str | Path,
    options: Options | None = None,
    settings: RunSettings | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Summary:
    """Write the shards of one source to ``output``: all of them, or nothing.

    The same inputs, tokenizer and options give the same bytes, for any number of workers or tasks.
    Raises ``DataError`` for wrong input, a folder that is already there and a full disk, and
    ``WorkerDied``; what was finished is kept for the next run of the same command.
    """
    options, settings = options or Options(), settings or RunSettings()
    found = find_files(inputs)
    loaded = load_tokenizer(tokenizer)
    units = plan_units(
        found.files,
        unit_bytes=settings.unit_bytes,
        by_line=options.text_by_line,
        options_key=f"{_UNIT_VERSION} {loaded.sha256} {options.key}",
    )
    total_bytes = sum(unit.num_bytes for unit in units)
    if not total_bytes:
        names = ", ".join(map(str, found.files[:_LISTED]))
        raise DataError(f"{names}: no document to train on; the input is empty, 0 bytes")
    progress = ReadProgress(f"preprocess {output.name}", total_bytes, show=show_progress)
    preparation = Preparation(options, loaded)
    run = Run(
        output,
        found.files,
        found.passed_over,
        units,
        loaded,
        options,
        settings,
        preparation,
        progress,
    )
    if _is_done(run) and not overwrite:
        discard(run.output)
        return _summary(run, "already done")
    check_free(output, overwrite=overwrite)
    with trouble_told(run.staging):
        run.unit_folder.mkdir(parents=True, exist_ok=True)
        with locked(run.staging, alone=run.settings.task is None), progress:
            return _carry_out(run)


def _carry_out(run: Run) -> Summary:
    settings = run.settings
    missing = run.missing()
    if settings.finish and missing:
        tasks = sorted({number % settings.num_tasks for number in missing})
        names = ", ".join(map(str, tasks[:20]))
        raise DataError(
            f"{run.staging}: {len(missing):,} of {len(run.units):,} units are not finished; run "
            f"task {names} of --num-tasks {settings.num_tasks} again, or leave --finish out to do "
            "the rest here"
        )
    if settings.task is not None:
        missing = [number for number in missing if number % settings.num_tasks == settings.task]
        mine = len(range(settings.task, len(run.units), settings.num_tasks))
    else:
        mine = len(run.units)
    run.units_kept = mine - len(missing)
    run.tally = tally_of(run)
    with Workers(settings.num_workers, num_counters=len(COUNTERS), preload=TEXT_PRELOAD) as workers:
        _work(run, [run.units[number] for number in missing], workers)
        if settings.task is not None:
            return _summary(run, "task done")
        records = [UnitRecord.read(run.unit_folder / unit.key) for unit in run.units]
        _check_result(run, records)
        folder = make_shards(run, records, workers)
    publish(folder, run.output)
    return _summary(run, "done")


def _work(run: Run, units: Sequence[Unit], workers: Workers) -> None:
    """Make the units that are missing. Raises what a unit raised; a damaged file only at the end,
    when every other unit is finished."""
    path, sha256 = str(run.tokenizer.path), run.tokenizer.sha256
    job = Job(str(run.unit_folder), path, sha256, run.settings.engine, run.options)
    workers.prepare(warm_up, job)
    run.verdict = check_engine(run, workers, job)
    run.progress.note(run.verdict.text())
    run.progress.note(run.preparation.bos_text)
    if warning := publishing_warning(run.tokenizer):
        run.progress.note(warning)
    job = replace(job, engine=run.verdict.engine, routes=run.verdict.routes)
    run.progress.total_bytes = max(sum(unit.num_bytes for unit in units), 1)

    def tick() -> None:
        num_bytes, tokens, rows, rejects = workers.counters
        run.progress.show(num_bytes, tokens, rejects)
        check_rejects_so_far(run, run.tally.plus(num_bytes, rows, rejects))

    results = workers.run(
        work_on_unit,
        [(job, unit) for unit in units],
        name_of=lambda task: task[1].name,
        on_tick=tick,
    )
    for _, result in results:
        if isinstance(result, DamagedFile):
            run.damaged.append(str(result))
        elif isinstance(result, Exception):
            raise result
    if run.damaged:
        more = len(run.damaged) - _LISTED
        listed = "\n".join(run.damaged[:_LISTED]) + (f"\nand {more} more" if more > 0 else "")
        raise DataError(f"{listed}\neverything else is finished and kept; nothing was published")


def _check_result(run: Run, records: Sequence[UnitRecord]) -> None:
    """Refuse a result that nobody can want, and say what was wrong with the input."""
    check_rejects(run, records)
    check_unknown(run, records)
    documents = {
        split: sum(record.shards[split].num_documents for record in records) for split in SPLITS
    }
    if documents["train"]:
        return
    names = ", ".join(map(str, run.files[:_LISTED]))
    discard(run.output)
    if documents["heldout"]:
        raise DataError(
            f"{names}: no document to train on: --heldout-frac {run.options.heldout_frac:g} holds "
            f"out all {documents['heldout']:,} of them; lower it, or give more documents"
        )
    rejects = told(total(record.rejects for record in records)) or "nothing"
    passed_over = told(total([run.passed_over, *(r.passed_over for r in records)])) or "nothing"
    filtered = sum(record.filtered for record in records)
    raise DataError(
        f"{names}: no document to train on (rejected: {rejects}; filtered: {filtered:,}; passed "
        f"over: {passed_over}); each document must hold text in {run.options.text_field!r}"
    )


def _summary(run: Run, state: str) -> Summary:
    manifests = {split: read_manifest(run.output / split) for split in SPLITS}
    if state == "task done":
        manifests = dict.fromkeys(SPLITS)
    known: dict[str, Any] = dict(next((m.options for m in manifests.values() if m), {}))
    found = {split: manifest for split, manifest in manifests.items() if manifest}
    return Summary(
        folder=run.output,
        documents={s: found[s].num_documents if s in found else 0 for s in SPLITS},
        tokens={s: found[s].num_tokens if s in found else 0 for s in SPLITS},
        rejects=known.get("rejected_rows", {}),
        passed_over=known.get("passed_over", {}),
        mended=known.get("mended_rows", 0),
        filtered=known.get("filtered_documents", 0),
        duplicates=known.get("duplicate_documents", 0),
        heldout_frac=known.get("heldout_frac", 0.0),
        unknown=Unknown.total(Unknown(**m.options.get("unknown", {})) for m in found.values()),
        bos=run.preparation.bos_text,
        read_bytes=run.progress.read_bytes,
        elapsed_s=run.progress.elapsed_s,
        engine=run.verdict.text() if run.verdict else "",
        state=state,
        units=len(run.units),
        units_kept=run.units_kept,
    )


def _is_done(run: Run) -> bool:
    """Whether the output was made from just this, and no input was touched since."""
    try:
        manifest = read_manifest(run.output / "train")
        made_at = (run.output / "train" / FILE_NAME).stat().st_mtime_ns
    except (DataError, OSError):
        return False
    if manifest is None or manifest.options.get("plan") != run.plan_key:
        return False
    return all(file.stat().st_mtime_ns <= made_at for file in run.files)
