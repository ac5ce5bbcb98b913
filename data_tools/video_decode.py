"""Frames and their times out of video and image files, by PyAV or by NVIDIA DALI.

One interface, ``opened(path, decoder)``: frames come one at a time as they are to be seen (rotation
applied), with the time they begin at. Whatever is wrong with a file is an ``Unreadable``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from megatron_curr.errors import DataError

Frame = NDArray[np.uint8]  # [height, width, 3]
TimedFrames = Iterator[tuple[float, Frame]]

DECODERS = ("pyav", "dali")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}
VIDEO_SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".gif"}
_DALI_CPU_CODECS = {"vp9", "libvpx-vp9", "mjpeg"}
_ODD_FPS = 240.0  # a container that claims more has no rate of its own


class Unreadable(Exception):
    """A file that does not decode; the message says why."""


@dataclass(frozen=True, slots=True)
class Media:
    """An open file: its size as seen, its mean rate (0: none, or none to believe), its frames."""

    width: int
    height: int
    fps: float
    is_image: bool
    frames: TimedFrames


@contextmanager
def opened(path: Path, decoder: str = "pyav") -> Iterator[Media]:
    """Open one file; errors while its frames are read are ``Unreadable`` too.

    Raises ``DataError`` where the decoder is not installed or has not the codec.
    """
    if path.suffix.lower() in IMAGE_SUFFIXES:
        yield _image(path)
        return
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unreadable("no video stream")
            stream = container.streams.video[0]
            stream.thread_count = 1
            first = next(container.decode(stream), None)
            if first is None:
                raise Unreadable("no frame")
            turns = round(first.rotation / 90) % 4
            fps = float(stream.average_rate or stream.guessed_rate or 0)
            fps = fps if fps <= _ODD_FPS else 0.0
            if decoder == "dali":
                frames = _dali_frames(path, stream.codec_context.name, turns, fps)
            else:
                frames = _pyav_frames(container, stream, first, turns, fps)
            height, width = (
                (first.width, first.height) if turns % 2 else (first.height, first.width)
            )
            yield Media(width, height, fps, False, frames)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Unreadable(str(error)) from error


def _image(path: Path) -> Media:
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            frame = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unreadable(str(error)) from error
    return Media(frame.shape[1], frame.shape[0], 0.0, True, iter([(0.0, frame)]))


def _pyav_frames(
    container: Any, stream: Any, first: av.VideoFrame, turns: int, fps: float
) -> TimedFrames:
    began_s = first.time or 0.0
    for number, frame in enumerate(chain([first], container.decode(stream))):
        pixels = frame.to_ndarray(format="rgb24")
        # A stream without time stamps plays at its mean rate.
        time_s = number / fps if frame.time is None and fps else (frame.time or 0.0) - began_s
        yield time_s, np.rot90(pixels, turns) if turns else pixels


def _dali_frames(path: Path, codec: str, turns: int, fps: float) -> TimedFrames:
    if importlib.util.find_spec("nvidia.dali") is None:
        raise DataError("decoder dali: not installed; pip install 'megatron-curr[dali]'")
    device = _dali_device()
    if device == "cpu" and codec not in _DALI_CPU_CODECS:
        raise DataError(
            f"{path}: is {codec}, and without a GPU DALI decodes VP9 and MJPEG only; use --decoder "
            "pyav"
        )
    pipeline = _dali_pipeline(device)
    try:
        pipeline.feed_input("file", [np.fromfile(path, np.uint8)])
        (batch,) = pipeline.run()
    except RuntimeError as error:
        _dali_pipeline.cache_clear()  # a pipeline does not survive an error
        raise Unreadable(str(error).strip().splitlines()[-1]) from error
    frames = np.asarray(batch.as_cpu().at(0))
    times = _packet_times(path)
    if len(times) != len(frames):
        times = [number / (fps or 1.0) for number in range(len(frames))]
    for time_s, frame in zip(times, frames, strict=True):
        yield time_s, np.rot90(frame, turns) if turns else frame


def _packet_times(path: Path) -> list[float]:
    """When each frame begins, from the container alone: DALI does not say."""
    with av.open(str(path)) as container:
        packets = container.demux(video=0)
        times = sorted(float(p.pts * p.time_base) for p in packets if p.pts is not None)
    return [time_s - times[0] for time_s in times]


def _dali_device() -> str:
    import torch

    return "mixed" if torch.cuda.is_available() else "cpu"


@lru_cache(maxsize=2)
def _dali_pipeline(device: str) -> Any:
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=1,
        num_threads=1,
        device_id=None if device == "cpu" else 0,
        prefetch_queue_depth=1,
        exec_dynamic=False,
        exec_async=False,
        exec_pipelined=False,
    )
    def decode() -> Any:
        return fn.decoders.video(
            fn.external_source(name="file", dtype=types.UINT8, ndim=1), device=device
        )

    pipeline = decode()
    pipeline.build()
    return pipeline
