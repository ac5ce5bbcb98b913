"""Turn videos and images with captions into the video shards of one source.

``OUT/train`` and ``OUT/heldout`` get tars (``megatron_curr/data/video_shards.py``); files and clips
that were not taken are listed in ``OUT/rejects.jsonl`` with the reason.

The work is cut in units of a few files, each written to ``OUT.partial`` whole or not at all, in any
order, by any process; the last step strings them together in order. So a run that was killed goes
on where it was, and workers and array tasks do not change a byte.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_tools.progress import ReadProgress
from data_tools.video_clips import REASONS, ClipMaker, ClipOptions, check_buckets
from data_tools.video_frames import Bucket
from data_tools.video_inputs import Item, find_items
from data_tools.workers import Workers
from megatron_curr.data.codecs import load_codec
from megatron_curr.data.text_features import load_text_encoder
from megatron_curr.data.video_manifest import FILE_NAME, VideoManifest
from megatron_curr.data.video_shards import INDEX
from megatron_curr.data.video_writer import VideoFolderWriter, pack_sample
from megatron_curr.durable import write_durably
from megatron_curr.errors import DataError

SPLITS = ("train", "heldout")
REJECTS = "rejects.jsonl"
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

    def fingerprint(self, maker: ClipMaker) -> str:
        """Of everything but the place of the weights."""
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
    """What a run wrote; ``finished`` is false for one task of several."""

    folder: Path
    finished: bool
    files: int
    samples: Mapping[str, Mapping[str, int]]  # split -> bucket -> samples
    rejects: Mapping[str, int]
    elapsed_s: float

    def text(self) -> str:
        """What a person wants to know of the run, in a few lines."""
        if not self.finished:
            return f"{self.folder}: this task's units are done; --finish puts them together"
        lines = []
        for split, buckets in self.samples.items():
            found = ", ".join(f"{count:,} {name}" for name, count in buckets.items())
            lines.append(f"{self.folder / split}: {found} samples")
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
    task: int = 0,
    num_tasks: int = 1,
    only_finish: bool = False,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Summary:
    """Write the shards of one source.

    A single task does it all. One of several does its units; once all have, a call with
    ``only_finish`` puts them together.
    Raises ``DataError`` for wrong input, units that are missing, buckets no sample fits, and a full
    disk, and ``WorkerDied``; what was finished is kept for the next run of the same command.
    """
    began_s = time.monotonic()
    items = find_items(inputs, file_field=file_field, caption_field=caption_field)
    job = Job(items, tuple(buckets), options or ClipOptions())
    if not job.buckets:
        raise DataError("no bucket: give --bucket NAME=HEIGHTxWIDTHxFRAMES or a recipe")
    if not 0 <= task < num_tasks:
        raise DataError(f"--task {task}: must be from 0 to {num_tasks - 1} (--num-tasks)")
    maker = _maker(job.buckets, job.options)
    staging = output.with_name(output.name + ".partial")
    _check_free(output, overwrite=overwrite)
    _open_staging(staging, job.fingerprint(maker), overwrite=overwrite)
    try:
        if not only_finish:
            units = range(task, job.num_units, num_tasks)
            _run_units(job, staging, units, workers, show=show_progress)
        if only_finish or num_tasks == 1:
            manifests, rejects = _finish(job, maker, staging, output)
        else:
            manifests, rejects = {}, Counter()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{staging}: the disk is full; free some space and run the same command again, it goes "
            "on where it was"
        ) from error
    return Summary(
        folder=output,
        finished=bool(manifests),
        files=len(items),
        samples={
            split: {name: bucket.num_samples for name, bucket in manifest.buckets.items()}
            for split, manifest in manifests.items()
        },
        rejects={reason: rejects[reason] for reason in REASONS if rejects[reason]},
        elapsed_s=time.monotonic() - began_s,
    )


@dataclass(frozen=True, slots=True)
class Unit:
    """What a worker is handed: a few files of a job, and where their samples go."""

    number: int
    items: Sequence[tuple[int, Item]]
    buckets: tuple[Bucket, ...]
    options: ClipOptions
    staging: Path


def _run_units(job: Job, staging: Path, numbers: range, workers: int, *, show: bool) -> None:
    """Write every unit that is not there yet. A worker that dies ends the run."""
    units = [
        Unit(number, tuple(job.items_of(number)), job.buckets, job.options, staging)
        for number in numbers
        if not (_unit_folder(staging, number) / "done.json").is_file()
    ]
    sizes = [
        sum(item.path.stat().st_size for _, item in unit.items if item.path.exists())
        for unit in units
    ]
    title = f"preprocess-video {staging.stem}"
    with (
        ReadProgress(title, sum(sizes), show=show) as progress,
        Workers(workers, num_counters=0, preload=["data_tools.video_clips"]) as pool,
    ):
        for number, done in pool.run(write_unit, units):
            if isinstance(done, Exception):
                raise done
            progress.advance(num_bytes=sizes[number], **done)


@lru_cache(maxsize=1)
def _maker(buckets: tuple[Bucket, ...], options: ClipOptions) -> ClipMaker:
    """Opens codec and encoder, once a process; raises ``DataError`` for buckets that do not fit."""
    codec = load_codec(options.codec)
    check_buckets(buckets, codec)
    encoder = load_text_encoder(options.text_encoder)
    if torch := sys.modules.get("torch"):  # not everything needs it, and it is slow to import
        torch.set_num_threads(1)  # cores are the workers', and sums depend on their number
    return ClipMaker(codec, encoder, buckets, options)


def write_unit(unit: Unit, counters: object) -> dict[str, int]:
    """Write one unit under a name of its own and rename it; what the progress counts."""
    folder = _unit_folder(unit.staging, unit.number)
    partial = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    maker = _maker(unit.buckets, unit.options)
    numbers = {bucket.name: number for number, bucket in enumerate(unit.buckets)}
    rows = {split: [np.empty(0, INDEX)] for split in SPLITS}
    rejects: list[dict[str, object]] = []
    not_in_bucket: Counter[tuple[str, str]] = Counter()
    latents = 0
    for split in SPLITS:
        (partial / f"{split}.body").touch()
    for number, item in unit.items:
        result = maker.samples_of(item, number)
        rejects += result.rejects
        not_in_bucket += result.not_in_bucket
        split = "heldout" if result.is_held_out else "train"
        with open(partial / f"{split}.body", "ab") as stream:
            for sample in result.samples:
                body, row = pack_sample(sample, numbers[sample.bucket])
                row["offset"] += stream.tell()
                stream.write(body)
                rows[split].append(row)
                latents += sample.latents_CTYX[0].size
    for split in SPLITS:
        np.save(partial / f"{split}.npy", np.concatenate(rows[split]), allow_pickle=False)
    counts = [[*place, count] for place, count in sorted(not_in_bucket.items())]
    record = {"rejects": rejects, "not_in_bucket": counts}
    write_durably(partial / "done.json", json.dumps(record, ensure_ascii=False) + "\n")
    os.rename(partial, folder)
    return {"tokens": latents, "rejects": len(rejects)}


def _finish(
    job: Job, maker: ClipMaker, staging: Path, output: Path
) -> tuple[dict[str, VideoManifest], Counter[str]]:
    """String the units together and let the folder appear."""
    folders = [_unit_folder(staging, unit) for unit in range(job.num_units)]
    missing = [n for n, folder in enumerate(folders) if not (folder / "done.json").is_file()]
    if missing:
        shown = ", ".join(map(str, missing[:8]))
        raise DataError(
            f"{staging}: {len(missing)} of {len(folders)} units are not done ({shown}); run every "
            "--task first (unit modulo --num-tasks is its task)"
        )
    done = [json.loads((folder / "done.json").read_bytes()) for folder in folders]
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
    _check_filled(manifests.get("train"), job, counts, done)
    with open(building / REJECTS, "w", encoding="utf-8") as listing:
        listing.writelines(json.dumps(reject, ensure_ascii=False) + "\n" for reject in rejects)
    _publish(building, output)
    shutil.rmtree(staging, ignore_errors=True)
    return manifests, counts


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


def _unit_folder(staging: Path, unit: int) -> Path:
    return staging / "units" / f"{unit:06d}"


def _open_staging(staging: Path, fingerprint: str, *, overwrite: bool) -> None:
    """Make the working folder, or go on in one of the same job."""
    mark = staging / "job.json"
    if overwrite and staging.exists() and not mark.is_file() and any(staging.iterdir()):
        raise DataError(f"{staging}: holds other files than ours; give another --output")
    found = json.loads(mark.read_bytes())["fingerprint"] if mark.is_file() else None
    if found not in (None, fingerprint):
        if not overwrite:
            raise DataError(
                f"{staging}: left by a run with other inputs or options; --overwrite drops it"
            )
        shutil.rmtree(staging)
    (staging / "units").mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        write_durably(mark, json.dumps({"fingerprint": fingerprint}) + "\n")


def _check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse to touch a folder that is there, unless it is ours and was offered up."""
    if not output.exists():
        return
    if not overwrite:
        raise DataError(
            f"{output}: already there; give another --output, or --overwrite to replace it"
        )
    ours = any((output / name / FILE_NAME).is_file() for name in SPLITS)
    if not ours and any(output.iterdir()):
        raise DataError(f"{output}: holds other files than shards of ours; give another --output")


def _publish(building: Path, output: Path) -> None:
    """Let the finished folder appear under its name; an old one goes only then."""
    old = output.with_name(output.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        os.rename(output, old)
    os.rename(building, output)
    shutil.rmtree(old, ignore_errors=True)
