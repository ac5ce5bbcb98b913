"""One file to its samples: decode, choose buckets, cut clips, filter, encode."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from data_tools.video_decode import DECODERS, Media, Unreadable, opened
from data_tools.video_frames import (
    Bucket,
    Frames,
    at_rate,
    fit,
    misfit,
    motion_of,
    sharpness_of,
)
from data_tools.video_inputs import Item
from megatron_curr.data.codecs import Codec
from megatron_curr.data.tensor_file import Floats
from megatron_curr.data.text_features import TextEncoder
from megatron_curr.data.video_writer import Sample
from megatron_curr.errors import DataError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.video_schema import VideoRecipe

# Why nothing of a file was taken, the reason that came nearest to taking it last.
REASONS = (
    *("no_caption", "unreadable", "no_bucket", "wrong_aspect", "too_small", "too_short"),
    *("static", "blurred"),
)
MIN_PATCHES = 2  # the model's patch along rows and columns


@dataclass(frozen=True, slots=True)
class ClipOptions:
    """What decides which clips come out of a file, and their bytes; recorded in the manifest."""

    codec: str = "haar"
    text_encoder: str = "hashed:256"
    decoder: str = "pyav"
    fps: float = 24.0
    max_clips: int = 16
    max_crop_frac: float = 0.4
    min_motion: float = 0.05
    min_sharpness: float = 1.0
    one_bucket: bool = False
    heldout_frac: float = 0.02

    def __post_init__(self) -> None:
        if self.decoder not in DECODERS:
            raise DataError(f"decoder {self.decoder!r}: use {' or '.join(DECODERS)}")
        if not self.fps > 0 or self.max_clips < 1:
            raise DataError(f"fps {self.fps}, max_clips {self.max_clips}: must be positive")
        if not (0 <= self.heldout_frac < 1 and 0 <= self.max_crop_frac < 1):
            raise DataError("heldout_frac and max_crop_frac must be from 0 to below 1")


@dataclass(slots=True)
class FileResult:
    """What came of one file: samples, else a reason; clips dropped alone count as well."""

    samples: list[Sample] = field(default_factory=list)
    rejects: list[dict[str, object]] = field(default_factory=list)
    not_in_bucket: Counter[tuple[str, str]] = field(default_factory=Counter)
    is_held_out: bool = False


@dataclass(frozen=True, slots=True)
class ClipMaker:
    """Codec, text encoder and buckets, opened once in each process."""

    codec: Codec
    text_encoder: TextEncoder
    buckets: Sequence[Bucket]
    options: ClipOptions

    def samples_of(self, item: Item, number: int) -> FileResult:
        """Everything one file gives. ``number`` makes the keys."""
        result = FileResult()
        if not item.caption:
            self._reject(result, item, "no_caption", "no caption in the list or beside the file")
            return result
        try:
            result.is_held_out = is_held_out(item.path, self.options.heldout_frac)
            with opened(item.path, self.options.decoder) as media:
                self._cut(media, item, number, result)
        except (Unreadable, OSError) as error:
            result.samples.clear()
            self._reject(result, item, "unreadable", str(error))
        return result

    def _cut(self, media: Media, item: Item, number: int, result: FileResult) -> None:
        fitting = []
        for bucket in self.buckets:
            why = "no_bucket" if bucket.is_image != media.is_image else None
            why = why or misfit(
                bucket, media.width, media.height, max_crop_frac=self.options.max_crop_frac
            )
            if why is None:
                fitting.append(bucket)
            else:
                result.not_in_bucket[bucket.name, why] += 1
        fps = min(self.options.fps, media.fps or self.options.fps)
        shots = self._shots(media, fitting, fps)
        text_LE = self.text_encoder.encode(item.caption)
        dropped: list[str] = []
        for bucket in sorted(fitting, key=lambda bucket: -bucket.volume):
            frames = shots[bucket.height, bucket.width]
            if len(frames) < bucket.num_frames:
                result.not_in_bucket[bucket.name, "too_short"] += 1
                continue
            first_sample = len(result.samples)
            for window, latents_CTYX, why in self._windows(frames, bucket):
                if why:
                    dropped.append(why)
                    self._reject(result, item, why, f"clip {window} of bucket {bucket.name}")
                    continue
                result.samples.append(
                    Sample(
                        key=f"{number:08d}-{bucket.name}-{window:03d}",
                        bucket=bucket.name,
                        latents_CTYX=latents_CTYX,
                        text_LE=text_LE,
                        fps=0.0 if media.is_image else fps,
                        caption=item.caption,
                        metadata={
                            "file": item.path.name,
                            "first_frame": window * bucket.num_frames,
                        },
                    )
                )
            if self.options.one_bucket and len(result.samples) > first_sample:
                break
        if not result.samples and not dropped:
            reasons = {why for _, why in result.not_in_bucket}
            nearest = max(reasons, key=REASONS.index)
            longest = max((len(frames) for frames in shots.values()), default=0)
            found = f"{media.width}x{media.height}, {longest or '?'} frames at {fps:g} a second"
            self._reject(result, item, nearest, found)

    def _shots(
        self, media: Media, fitting: Sequence[Bucket], fps: float
    ) -> dict[tuple[int, int], Frames]:
        """The file's frames at each size a bucket wants, [F, H, W, 3], as many as are needed."""
        sizes = {(bucket.height, bucket.width): bucket for bucket in fitting}
        if not sizes:
            return {}
        wanted = max(bucket.num_frames for bucket in fitting) * self.options.max_clips
        frames: dict[tuple[int, int], list[Frames]] = {size: [] for size in sizes}
        for frame in islice(at_rate(media.frames, fps), wanted):
            for size, bucket in sizes.items():
                frames[size].append(fit(frame, bucket))
        empty = np.empty((0, 1, 1, 3), np.uint8)
        return {size: np.stack(shot) if shot else empty for size, shot in frames.items()}

    def _windows(self, frames: Frames, bucket: Bucket) -> Iterator[tuple[int, Floats, str | None]]:
        """(number, latents, why not) of each clip that fits in, end to end."""
        length = bucket.num_frames
        num_windows = min(len(frames) // length, self.options.max_clips)
        chunk = self.codec.chunk_frames
        # Chunks that stand alone are encoded in one go and cut apart as latents.
        sliced = chunk is not None and length % chunk == 0
        whole = self.codec.encode(frames[: num_windows * length]) if sliced else None
        for window in range(num_windows):
            part = frames[window * length : (window + 1) * length]
            why = self._fault(part)
            if why:
                latents = np.empty((0, 0, 0, 0), np.float32)
            elif whole is not None:
                steps = whole.shape[1] // num_windows
                latents = whole[:, window * steps : (window + 1) * steps]
            else:
                latents = self.codec.encode(part)
            yield window, latents, why

    def _fault(self, frames: Frames) -> str | None:
        if len(frames) > 1 and motion_of(frames) < self.options.min_motion:
            return "static"
        return "blurred" if sharpness_of(frames) < self.options.min_sharpness else None

    def _reject(self, result: FileResult, item: Item, reason: str, detail: str) -> None:
        result.rejects.append({"file": str(item.path), "reason": reason, "detail": detail})


def is_held_out(path: Path, heldout_frac: float) -> bool:
    """Whether a file belongs to the held-out side: by its content, wherever it lies."""
    digest = hashlib.blake2b(digest_size=8, person=b"heldout")
    with open(path, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return int.from_bytes(digest.digest(), "little") < heldout_frac * 2.0**64


def buckets_of_recipe(path: Path, source: str | None) -> list[Bucket]:
    """The buckets of one source of a video recipe; ``source`` may be left out where there is one.

    Raises ``DataError`` for a text recipe and an unknown source.
    """
    recipe = load_recipe(path)
    if not isinstance(recipe, VideoRecipe):
        raise DataError(f"{path}: is a recipe for text and has no buckets")
    known = list(recipe.data.sources)
    source = source or (known[0] if len(known) == 1 else None)
    if source not in known:
        raise DataError(
            f"{path}: no source {source or ''!r}; choose --source of {', '.join(known)}"
        )
    shapes = recipe.data.buckets
    return [
        Bucket(name, shapes[name].height, shapes[name].width, shapes[name].num_frames)
        for name in recipe.data.sources[source].buckets
    ]


def check_buckets(buckets: Sequence[Bucket], codec: Codec) -> None:
    """Raise ``DataError`` for a bucket whose latents the model's patches do not divide."""
    _, *sides = codec.record.compression
    for bucket in buckets:
        for what, size, side in zip(
            ("height", "width"), (bucket.height, bucket.width), sides, strict=True
        ):
            step = side * MIN_PATCHES
            if size < step or size // side % MIN_PATCHES:
                low = max(size // step * step, step)
                raise DataError(
                    f"bucket {bucket.name!r}: {what} {size} makes {size // side} latents of "
                    f"{side} pixels (codec {codec.record.name!r}), no multiple of the patch, "
                    f"{MIN_PATCHES}; take {low} to {low + side - 1}, or {low + step}"
                )
        codec.check_frames(bucket.num_frames)
