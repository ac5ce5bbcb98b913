"""A few files of a job to packed samples on disk: what one worker does at a time.

A unit leaves a folder with the samples and index rows of each side of the split and ``done.json``.
It appears under its name when everything in it is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_tools.staging import SPLITS
from data_tools.video_clips import ClipMaker, ClipOptions, check_buckets
from data_tools.video_frames import Bucket
from data_tools.video_inputs import Item
from data_tools.workers import Desk
from megatron_curr.data.codecs import load_codec
from megatron_curr.data.text_features import load_text_encoder
from megatron_curr.data.video_shards import INDEX
from megatron_curr.data.video_writer import pack_sample
from megatron_curr.durable import sync, write_durably

DONE = "done.json"


@dataclass(frozen=True, slots=True)
class Unit:
    """What a worker is handed: a few files of a job, and where their samples go."""

    number: int
    items: Sequence[tuple[int, Item]]
    buckets: tuple[Bucket, ...]
    options: ClipOptions
    staging: Path

    def name(self) -> str:
        """For messages."""
        first, *others = (item.path for _, item in self.items)
        return f"{first} and the {len(others)} files after it"


@lru_cache(maxsize=1)
def open_maker(buckets: tuple[Bucket, ...], options: ClipOptions) -> ClipMaker:
    """Opens codec and encoder, once a process; raises ``DataError`` for buckets that do not fit."""
    codec = load_codec(options.codec)
    check_buckets(buckets, codec)
    encoder = load_text_encoder(options.text_encoder)
    if torch := sys.modules.get("torch"):  # not everything needs it, and it is slow to import
        torch.set_num_threads(1)  # cores are the workers', and sums depend on their number
    return ClipMaker(codec, encoder, buckets, options)


def write_unit(unit: Unit, desk: Desk) -> dict[str, int]:
    """Write one unit under a name of its own and rename it; what the progress counts.

    Leaves nothing half done but where it is killed.
    """
    folder = unit_folder(unit.staging, unit.number)
    partial = folder.with_name(f"{folder.name}.{os.uname().nodename}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        counts = _write_samples(unit, partial)
        for path in partial.iterdir():
            sync(path)
        try:
            os.rename(partial, folder)
        except OSError:
            if not (folder / DONE).is_file():  # else another task made the same unit
                raise
        sync(folder.parent)
        return counts
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write_samples(unit: Unit, folder: Path) -> dict[str, int]:
    maker = open_maker(unit.buckets, unit.options)
    numbers = {bucket.name: number for number, bucket in enumerate(unit.buckets)}
    rows = {split: [np.empty(0, INDEX)] for split in SPLITS}
    rejects: list[dict[str, object]] = []
    not_in_bucket: Counter[tuple[str, str]] = Counter()
    latents = 0
    for split in SPLITS:
        (folder / f"{split}.body").touch()
    for number, item in unit.items:
        result = maker.samples_of(item, number)
        rejects += result.rejects
        not_in_bucket += result.not_in_bucket
        split = "heldout" if result.is_held_out else "train"
        with open(folder / f"{split}.body", "ab") as stream:
            for sample in result.samples:
                body, row = pack_sample(sample, numbers[sample.bucket])
                row["offset"] += stream.tell()
                stream.write(body)
                rows[split].append(row)
                latents += sample.latents_CTYX[0].size
    for split in SPLITS:
        np.save(folder / f"{split}.npy", np.concatenate(rows[split]), allow_pickle=False)
    counts = [[*place, count] for place, count in sorted(not_in_bucket.items())]
    record = {"rejects": rejects, "not_in_bucket": counts}
    write_durably(folder / DONE, json.dumps(record, ensure_ascii=False) + "\n")
    return {"tokens": latents, "rejects": len(rejects)}


def unit_folder(staging: Path, unit: int) -> Path:
    return staging / "units" / f"{unit:06d}"
