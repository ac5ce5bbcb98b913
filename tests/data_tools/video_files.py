"""Small real video files, among them the kinds that go wrong."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_tools.make_video_demo import draw, scene
from data_tools.video_frames import Frames

FORMATS = {
    ".mp4": ("libx264", "yuv420p", {"crf": "12"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "12", "b": "0", "cpu-used": "8"}),
    ".avi": ("mjpeg", "yuvj420p", {"qmin": "1", "qmax": "2"}),
    ".mov": ("libx264", "yuv444p", {"crf": "12"}),  # takes odd sizes
}


def shapes(number: int, *, num_frames: int = 16, size: int = 64) -> Frames:
    """A shape on dark ground, moving."""
    return draw(scene(number), size=size, num_frames=num_frames)


def write_clip(
    path: Path, frames: Frames, *, fps: int = 16, times: list[int] | None = None
) -> Path:
    """Encode; ``times`` in units of 1/fps make the frame rate vary."""
    codec, pixel_format, options = FORMATS[path.suffix]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.thread_count = 1
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def rotate(path: Path, turns: int) -> Path:
    """Say in an mp4's track header that it is to be shown turned by quarters, clockwise."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    cos, sin = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}[turns]
    one = 1 << 16
    matrix = (cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30)
    content[at : at + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(content)
    return path


def write_sound(path: Path) -> Path:
    """A file without a video stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_nothing(path: Path) -> Path:
    """A film of no frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 32
        container.start_encoding()
    return path
