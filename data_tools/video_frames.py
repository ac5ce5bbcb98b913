"""From the frames of a file to clips of a bucket: rate, size and crop, and what is not worth it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.video_decode import Frame, TimedFrames

Frames = NDArray[np.uint8]  # [F, H, W, 3]
_LATE_S = 1e-3  # time stamps are rounded to the clock of the container, often milliseconds


@dataclass(frozen=True, slots=True)
class Bucket:
    """One shape of samples, in pixels; ``num_frames`` 1 takes images."""

    name: str
    height: int
    width: int
    num_frames: int

    @property
    def is_image(self) -> bool:
        return self.num_frames == 1

    @property
    def volume(self) -> int:
        return self.height * self.width * self.num_frames


def at_rate(frames: TimedFrames, fps: float) -> Iterator[Frame]:
    """What is on the screen at 0, 1/fps, 2/fps, ... until the last frame begins.

    Also for variable frame rates; a frame whose time does not come is passed over.
    """
    shown: Frame | None = None
    number = 0
    time_s = 0.0
    for time_s, frame in frames:
        while shown is not None and number / fps < time_s - _LATE_S:
            yield shown
            number += 1
        shown = frame
    while shown is not None and number / fps <= time_s + _LATE_S:
        yield shown
        number += 1


def misfit(bucket: Bucket, width: int, height: int, *, max_crop_frac: float) -> str | None:
    """Why a picture of that size is not taken by the bucket, or ``None``."""
    if width < bucket.width or height < bucket.height:
        return "too_small"
    scale = max(bucket.width / width, bucket.height / height)
    kept_frac = bucket.width * bucket.height / (scale * width * scale * height)
    return "wrong_aspect" if 1 - kept_frac > max_crop_frac else None


def fit(frame: Frame, bucket: Bucket) -> Frame:
    """Scale down to cover the bucket and crop to it from the middle."""
    height, width = frame.shape[:2]
    if (height, width) == (bucket.height, bucket.width):
        return np.ascontiguousarray(frame)
    scale = max(bucket.width / width, bucket.height / height)
    crop_width, crop_height = bucket.width / scale, bucket.height / scale
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    image = Image.fromarray(np.ascontiguousarray(frame))
    resized = image.resize(
        (bucket.width, bucket.height),
        Image.Resampling.BICUBIC,
        box=(left, top, left + crop_width, top + crop_height),
    )
    return np.asarray(resized)


def motion_of(frames: Frames) -> float:
    """Mean change of a grey level from one frame to the next, of 255."""
    grey = frames.mean(3, dtype=np.float32)
    return float(np.abs(np.diff(grey, axis=0)).mean())


def sharpness_of(frames: Frames) -> float:
    """Variance of the Laplacian of the middle frame's grey levels: next to 0 when out of focus."""
    grey = frames[len(frames) // 2].mean(2, dtype=np.float32)
    inner = grey[1:-1, 1:-1]
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    return float((around - 4 * inner).var())
