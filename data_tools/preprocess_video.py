"""Turn videos and images with captions into the video shards of one source.

``OUT/train`` and ``OUT/heldout`` get tars (``megatron_curr/data/video_shards.py``); files and clips
that were not taken are listed in ``OUT/rejects.jsonl`` with the reason.

The work is cut in units of a few files, each written to ``OUT.partial`` whole or not at all, in any
order, by any process; the last step strings them together in order. So a run that was killed goes
on where it was, and workers and array tasks do not change a byte.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np

from data_tools.progress import ReadProgress
from data_tools.staging import (
    MANIFEST,
    SPLITS,
    check_free,
    discard,
    locked,
    publish,
    staging_of,
    trouble_told,
)
from data_tools.video_clips import REASONS, ClipOptions
from data_tools.video_frames import Bucket
from data_tools.video_inputs import Item, find_items
from data_tools.video_units import DONE, Unit, open_maker, unit_folder, write_unit
from data_tools.workers import Workers
from megatron_curr.data.video_manifest import VideoManifest, read_video_manifest
from megatron_curr.data.video_writer import VideoFolderWriter
from megatron_curr.durable import write_once
from megatron_curr.errors import DataError

REJECTS = "rejects.jsonl"
JOB = "job.json"  # what the folder is made of: in the working folder, then in the output
UNIT_FILES = 16
TAR_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Job:
    """All that decides the bytes that come out."""

    items: Sequence[Item]
    buckets: tuple[Bucket, ...]
    options: ClipOptions

    @property
    def num_units(self) -> int:
        return -(-len(self.items) // UNIT_FILES)

    def items_of(self, unit: int) -> Iterator[tuple[int, Item]]:
        first = unit * UNIT_FILES
        yield from enumerate(self.items[first : first + UNIT_FILES], start=first)

    @property
    def fingerprint(self) -> str:
        """Of everything but the place of the weights."""
        maker = open_maker(self.buckets, self.options)
        content = {
            "items": [(str(item.path), item.caption) for item in self.items],
            "buckets": [asdict(bucket) for bucket in self.buckets],
            "options": asdict(self.options),
            "codec": maker.codec.record.sha256,
            "text_encoder": maker.text_encoder.record.sha256,
            "unit_files": UNIT_FILES,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run wrote; one task of several has no shards yet."""

    folder: Path
    state: str  # "done", "already done" or "task done"
    files: int
    samples: Mapping[str, Mapping[str, int]]  # split -> bucket -> samples
    rejects: Mapping[str, int]
    elapsed_s: float

    def text(self) -> str:
        """What a person wants to know of the run, in a few lines."""
        lines = [] if self.state == "done" else [f"{self.folder}: {self.state}"]
        for split, buckets in self.samples.items():
            found = ", ".join(f"{count:,} {name}" for name, count in buckets.items())
            lines.append(f"{self.folder / split}: {found} samples")
        held_out = self.samples.get("heldout", {})
        unheld = [name for name in self.samples.get("train", {}) if not held_out.get(name)]
        if unheld:
            lines.append(f"nothing held out of {', '.join(unheld)}: --heldout-frac or more files")
        if self.rejects:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.rejects.items())
            lines.append(f"not taken: {reasons}; listed in {self.folder / REJECTS}")
        lines.append(f"{self.files:,} files in {self.elapsed_s:.1f} s")
        return "\n".join(lines)

    def json(self) -> str:
        """The same for scripts."""
        return json.dumps({**asdict(self), "folder": str(self.folder)})


def preprocess_video(
    inputs: Sequence[Path],
    output: Path,
    *,
    buckets: Sequence[Bucket],
    options: ClipOptions | None = None,
    file_field: str = "file",
    caption_field: str = "caption",
    workers: int = 1,
    task: int | None = None,
    num_tasks: int = 1,
    finish: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Summary:
    """Write the shards of one source.

    Without ``task`` all of it is done. A task of several does its units; once all have, a call with
    ``finish`` puts them together.
    Raises ``DataError`` for wrong input, units that are missing, buckets no sample fits, and a full
    disk, and ``WorkerDied``; what was finished is kept for the next run of the same command.
    """
    began_s = time.monotonic()
    if task is not None and not 0 <= task < num_tasks:
        raise DataError(f"--task {task}: must be from 0 to {num_tasks - 1} (--num-tasks)")
    if task is not None and finish:
        raise DataError("--task and --finish: give one; --finish comes after all tasks")
    job = plan_job(
        inputs,
        buckets=buckets,
        options=options,
        file_field=file_field,
        caption_field=caption_field,
    )
    staging = staging_of(output)
    if not open_staging(job, output, overwrite=overwrite):
        return _summary(job, output, "already done", began_s)
    with trouble_told(staging), locked(staging, alone=task is None):
        if not finish:
            units = range(task or 0, job.num_units, num_tasks if task is not None else 1)
            _run_units(job, staging, units, workers, show=show_progress)
        if task is None:
            _finish(job, staging, output)
    return _summary(job, output, "done" if task is None else "task done", began_s)


def plan_job(
    inputs: Sequence[Path],
    *,
    buckets: Sequence[Bucket],
    options: ClipOptions | None = None,
    file_field: str = "file",
    caption_field: str = "caption",
) -> Job:
    """Find the files and check all that can be checked before one is opened."""
    items = find_items(inputs, file_field=file_field, caption_field=caption_field)
    named = tuple(sorted(buckets, key=attrgetter("name")))
    job = Job(items, named, options or ClipOptions())
    if not job.buckets:
        raise DataError("no bucket: give --bucket NAME=HEIGHTxWIDTHxFRAMES or a recipe")
    open_maker(job.buckets, job.options)
    return job


def open_staging(job: Job, output: Path, *, overwrite: bool) -> bool:
    """Make the working folder, or go on in one of the same job; False where nothing is left to do.

    Raises ``DataError`` where other things are in the way.
    """
    staging = staging_of(output)
    mark = staging / JOB
    if not overwrite and _is_done(job, output):
        discard(output)
        return False
    check_free(output, overwrite=overwrite)
    if overwrite and staging.exists() and not mark.is_file() and any(staging.iterdir()):
        raise DataError(f"{staging}: holds other files than ours; give another --output")
    content = json.dumps({"fingerprint": job.fingerprint}) + "\n"
    with trouble_told(staging):
        if mark.is_file() and mark.read_text() != content:
            if not overwrite:
                raise DataError(
                    f"{staging}: left by a run with other inputs or options; --overwrite drops it"
                )
            with locked(staging, alone=True):
                discard(output)
        (staging / "units").mkdir(parents=True, exist_ok=True)
        if not mark.is_file():
            write_once(mark, content)  # tasks start together
    return True


def _is_done(job: Job, output: Path) -> bool:
    """Whether the output was made by just this job, and no input was touched since."""
    try:
        found = json.loads((output / JOB).read_bytes())
        made_at = (output / JOB).stat().st_mtime_ns
    except (OSError, ValueError):
        return False
    if found != {"fingerprint": job.fingerprint}:
        return False
    paths = (item.path for item in job.items)
    return all(path.stat().st_mtime_ns <= made_at for path in paths if path.exists())


def _summary(job: Job, output: Path, state: str, began_s: float) -> Summary:
    manifests = {}
    if state != "task done":
        folders = {split: output / split for split in SPLITS}
        manifests = {
            split: read_video_manifest(folder)
            for split, folder in folders.items()
            if (folder / MANIFEST).is_file()
        }
    counts = next((manifest.options["not_taken"] for manifest in manifests.values()), {})
    return Summary(
        folder=output,
        state=state,
        files=len(job.items),
        samples={
            split: {name: bucket.num_samples for name, bucket in manifest.buckets.items()}
            for split, manifest in manifests.items()
        },
        rejects={reason: counts[reason] for reason in REASONS if reason in counts},
        elapsed_s=time.monotonic() - began_s,
    )


def _run_units(job: Job, staging: Path, numbers: range, workers: int, *, show: bool) -> None:
    """Write every unit that is not there yet. A worker that dies ends the run."""
    units = [
        Unit(number, tuple(job.items_of(number)), job.buckets, job.options, staging)
        for number in numbers
        if not (unit_folder(staging, number) / DONE).is_file()
    ]
    sizes = [
        sum(item.path.stat().st_size for _, item in unit.items if item.path.exists())
        for unit in units
    ]
    title = f"preprocess-video {staging.stem}"
    with (
        ReadProgress(title, sum(sizes), show=show) as progress,
        Workers(workers, num_counters=0, preload=["data_tools.video_units"]) as pool,
    ):
        for number, done in pool.run(write_unit, units, name_of=Unit.name):
            if isinstance(done, Exception):
                raise done
            progress.advance(num_bytes=sizes[number], **done)


def _finish(job: Job, staging: Path, output: Path) -> None:
    """String the units together and let the folder appear."""
    maker = open_maker(job.buckets, job.options)
    folders = [unit_folder(staging, unit) for unit in range(job.num_units)]
    missing = [n for n, folder in enumerate(folders) if not (folder / DONE).is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:8]))
        raise DataError(
            f"{staging}: {len(missing)} of {len(folders)} units are not done ({shown}); run every "
            "--task first (unit modulo --num-tasks is its task)"
        )
    done = [json.loads((folder / DONE).read_bytes()) for folder in folders]
    rejects = [reject for unit in done for reject in unit["rejects"]]
    counts = Counter(str(reject["reason"]) for reject in rejects)
    building = staging / "finished"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    shapes = {b.name: (b.height, b.width, b.num_frames) for b in job.buckets}
    manifests = {}
    for split in SPLITS:
        rows = [np.load(folder / f"{split}.npy", allow_pickle=False) for folder in folders]
        if not any(map(len, rows)):
            continue
        writer = VideoFolderWriter(building / split, shapes, tar_bytes=TAR_BYTES)
        for folder, unit_rows in zip(folders, rows, strict=True):
            body = folder / f"{split}.body"
            with open(body, "rb") as stream:
                if len(unit_rows):
                    writer.append(stream, body.stat().st_size, unit_rows)
        manifests[split] = writer.finish(
            maker.codec.record,
            maker.text_encoder.record,
            empty_text_LE=maker.text_encoder.encode(""),
            options={
                **asdict(job.options),
                "split": split,
                "not_taken": dict(sorted(counts.items())),
            },
        )
    try:
        _check_filled(manifests.get("train"), job, counts, done)
    except DataError:
        discard(output)  # what mends it makes another job of it
        raise
    with open(building / REJECTS, "w", encoding="utf-8") as listing:
        listing.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    shutil.copy2(staging / JOB, building / JOB)  # its time is the start of the run
    publish(building, output)


def _check_filled(
    train: VideoManifest | None, job: Job, counts: Counter[str], done: Sequence[Mapping[str, list]]
) -> None:
    """Raise ``DataError`` for a bucket without one training sample, saying why."""
    for bucket in job.buckets:
        if train is not None and train.buckets[bucket.name].num_samples:
            continue
        why: Counter[str] = Counter()
        for unit in done:
            for name, reason, count in unit["not_in_bucket"]:
                why[reason] += count if name == bucket.name else 0
        found = ", ".join(f"{n:,} {reason}" for reason, n in (+why or counts).most_common())
        raise DataError(
            f"bucket {bucket.name!r} ({bucket.height}x{bucket.width}, {bucket.num_frames} frames): "
            f"not one of {len(job.items):,} files gives a training sample ({found or 'held out'}): "
            "take the bucket out, or give files that fit"
        )
