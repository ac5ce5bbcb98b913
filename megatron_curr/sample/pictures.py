"""Clips as files to look at: mp4 for each, and one contact sheet of all."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from megatron_curr.data.codecs import Frames
from megatron_curr.errors import DataError

SHEET_COLUMNS = 8
_LEAST_PIXELS = 96  # of a picture on the sheet; smaller ones are enlarged, without smoothing
_GAP, _LINE = 4, 16
_PAPER, _INK = (250, 250, 250), (20, 20, 20)


def write_mp4(path: Path, frames: Frames, *, fps: float) -> None:
    """H.264 in the format that every player knows; odd sizes lose a row or column."""
    rate = Fraction(fps).limit_denominator(1000)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "14"})
        height, width = (side - side % 2 for side in frames.shape[1:3])
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        for frame in frames[:, :height, :width]:
            pixels = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(pixels))
        container.mux(stream.encode())


def write_contact_sheet(path: Path, clips: Sequence[Frames], titles: Sequence[str]) -> None:
    """A row for each clip: its title, then frames evenly spaced from the first to the last."""
    rows = [_row(clip, title) for clip, title in zip(clips, titles, strict=True)]
    width = max(row.width for row in rows) + 2 * _GAP
    sheet = Image.new("RGB", (width, sum(row.height + _GAP for row in rows) + _GAP), _PAPER)
    top = _GAP
    for row in rows:
        sheet.paste(row, (_GAP, top))
        top += row.height + _GAP
    sheet.save(path)


def _row(clip: Frames, title: str) -> Image.Image:
    height, width = clip.shape[1:3]
    zoom = max(1, -(-_LEAST_PIXELS // height))
    columns = min(SHEET_COLUMNS, len(clip))
    size = (width * zoom, height * zoom)
    row = Image.new("RGB", (columns * (size[0] + _GAP) - _GAP, size[1] + _LINE), _PAPER)
    ImageDraw.Draw(row).text((0, 2), title, fill=_INK)
    for column, number in enumerate(np.linspace(0, len(clip) - 1, columns).round().astype(int)):
        picture = Image.fromarray(clip[number]).resize(size, Image.Resampling.NEAREST)
        row.paste(picture, (column * (size[0] + _GAP), _LINE))
    return row


def read_picture(path: Path, *, height: int, width: int) -> Frames:
    """One frame [1, H, W, 3], scaled to cover the size and cropped from the middle."""
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({error})") from error
    return np.asarray(ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC))[None]
