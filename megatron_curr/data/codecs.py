"""From frames to normalised latents and back: one interface, opened by name.

* ``haar``: wavelets, no weights; the default
* ``diffusers:FOLDER``: any image or video autoencoder saved by diffusers
* ``mugv:FILE``: MUG-V's own, from its ``vae.pt``

Legend: F frames, H W pixel rows and columns, C latent channels, T latent frames, Y X latent rows
and columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.tensor_file import Floats
from megatron_curr.data.video_manifest import CodecRecord
from megatron_curr.errors import DataError

Frames = NDArray[np.uint8]


class Codec(Protocol):
    """What makes latents.

    ``T`` is always the number of frames over the compression, rounded up; ``Y`` and ``X`` are rows
    and columns over it, rounded down: what is left over at the border makes no latent.
    """

    @property
    def record(self) -> CodecRecord:
        """Everything that decides the latents, as the manifest keeps it."""

    @property
    def chunk_frames(self) -> int | None:
        """Frames that are encoded on their own, so that latents may be cut apart between them."""

    def check_frames(self, num_frames: int) -> None:
        """Raise ``DataError``, naming numbers that fit, where clips of that length do not."""

    def encode(self, frames_FHWC: Frames) -> Floats:
        """Normalised latents [C, T, Y, X]."""

    def decode(self, latents_CTYX: Floats) -> Frames:
        """Frames [F, H, W, 3]; an image latent comes back as every frame it stands for."""


# Mean and scale of each subband, (t, y, x) low or high in binary order; they are part of the codec.
# Those of the demo's clips, except that what is high twice counts for less than unit variance: it
# is the part of the picture that is seen least.
_HAAR_MEAN = (-0.7, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_HAAR_STD = (0.29, 0.075, 0.085, 0.05, 0.07, 0.05, 0.05, 0.05)
_SIDE = 8  # pixels and frames a latent stands for
_CELL = 4  # pixels and frames that are averaged before the last level


class HaarCodec:
    """Three levels of the Haar transform over 8 x 8 x 8 pixels, of which the coarsest is kept.

    Block means over 4 x 4 x 4, then one transform of pairs along time, height and width: 8 subbands
    of 3 colours are 24 channels out of 1,536 numbers. Each 8 frames stand alone; a clip of 8 k + 1
    frames has its first one repeated, so that it becomes an image latent.
    """

    chunk_frames = _SIDE

    def __init__(self) -> None:
        mean, std = np.repeat(_HAAR_MEAN, 3), np.repeat(_HAAR_STD, 3)
        self._mean_C, self._std_C = mean.astype(np.float32), std.astype(np.float32)
        described = f"haar 1 {_SIDE} {_CELL} {mean.tolist()} {std.tolist()}"
        self.record = CodecRecord(
            name="haar",
            sha256=hashlib.sha256(described.encode()).hexdigest(),
            compression=(_SIDE, _SIDE, _SIDE),
            channels=24,
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
            input_range=(-1.0, 1.0),
        )

    def check_frames(self, num_frames: int) -> None:
        check_chunks(num_frames, _SIDE, "haar")

    def encode(self, frames_FHWC: Frames) -> Floats:
        frames_FHWC = whole_latents(whole_chunks(frames_FHWC, _SIDE), _SIDE)
        num_frames, height, width, _ = frames_FHWC.shape
        t, y, x = num_frames // _CELL, height // _CELL, width // _CELL
        cells = frames_FHWC.reshape(t, _CELL, y, _CELL, x, _CELL, 3)
        means = cells.mean((1, 3, 5), dtype=np.float64) / 127.5 - 1
        pairs = means.reshape(t // 2, 2, y // 2, 2, x // 2, 2, 3)
        bands = np.transpose(pairs, (1, 3, 5, 6, 0, 2, 4))  # [t, y, x, colour, T, Y, X]
        for axis in range(3):
            bands = _haar(bands, axis) / 2
        raw = bands.reshape(24, t // 2, y // 2, x // 2)
        return ((raw - _wide(self._mean_C)) / _wide(self._std_C)).astype(np.float32)

    def decode(self, latents_CTYX: Floats) -> Frames:
        _, t, y, x = latents_CTYX.shape
        raw = latents_CTYX * _wide(self._std_C) + _wide(self._mean_C)
        bands = raw.reshape(2, 2, 2, 3, t, y, x)
        for axis in range(3):
            bands = _haar(bands, axis)
        cells = np.transpose(bands, (4, 0, 5, 1, 6, 2, 3)).reshape(t * 2, y * 2, x * 2, 3)
        pixels = np.rint(np.clip((cells + 1) * 127.5, 0, 255)).astype(np.uint8)
        return pixels.repeat(_CELL, 0).repeat(_CELL, 1).repeat(_CELL, 2)


def _haar(values: NDArray[np.floating], axis: int) -> NDArray[np.floating]:
    """(first + second, first - second) along an axis of two; twice is times two."""
    first, second = np.take(values, 0, axis), np.take(values, 1, axis)
    return np.stack([first + second, first - second], axis)


def _wide(values_C: Floats) -> Floats:
    return values_C[:, None, None, None]


def whole_chunks(frames_FHWC: Frames, chunk: int) -> Frames:
    """The frames, the first repeated where one stands before whole chunks."""
    if len(frames_FHWC) % chunk == 1:
        return np.concatenate([frames_FHWC[:1].repeat(chunk - 1, 0), frames_FHWC])
    return frames_FHWC


def whole_latents(frames_FHWC: Frames, side: int) -> Frames:
    """The frames without the last rows and columns where those make no whole latent."""
    height, width = (size // side * side for size in frames_FHWC.shape[1:3])
    return frames_FHWC[:, :height, :width]


def check_chunks(num_frames: int, chunk: int, codec: str) -> None:
    """Raise ``DataError`` unless clips are whole chunks, or whole chunks and one frame before."""
    if num_frames % chunk in (0, 1):
        return
    low = num_frames // chunk * chunk
    raise DataError(
        f"num_frames {num_frames}: codec {codec!r} takes {chunk} frames at a time, or one more for "
        f"an image before them; take {low or 1}, {low + 1} or {low + chunk}"
    )


def load_codec(name: str) -> Codec:
    """Raises ``DataError`` for an unknown name, and for weights that are missing or damaged."""
    kind, _, place = name.partition(":")
    if kind == "haar" and not place:
        return HaarCodec()
    if kind == "diffusers" and place:
        from megatron_curr.data.diffusers_codec import DiffusersCodec

        return DiffusersCodec(Path(place))
    if kind == "mugv" and place:
        from megatron_curr.data.mugv_codec import MugvCodec

        return MugvCodec(Path(place))
    raise DataError(f"codec {name!r}: not known; use 'haar', 'diffusers:FOLDER' or 'mugv:FILE'")
