"""Video samples in tars: normalised latents and text features, any of them read by its number.

A folder holds webdataset tars ``NNNNN.tar``, one ``index.npy`` over all of them that is mapped and
not read, ``empty_text.safetensors`` (the features of the empty caption) and ``manifest.json``. A
sample is two members: ``KEY.json`` (caption, fps, bucket, where it came from) and
``KEY.safetensors`` (``latents`` [C, T, Y, X] and ``text`` [L, E] in bf16, the text unpadded).

Legend: C latent channels, T latent frames, Y X latent rows and columns, L text tokens, E its width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.tensor_file import Floats, unpack_tensors
from megatron_curr.data.video_manifest import VideoManifest, read_video_manifest
from megatron_curr.errors import DataError

Ints = NDArray[np.int64]

INDEX_NAME = "index.npy"
EMPTY_TEXT_NAME = "empty_text.safetensors"
# One row a sample. The two members lie side by side, so a sample is one read of the tar:
# ``json_bytes`` at ``offset``, ``tensor_bytes`` at ``offset + tensors_at``.
INDEX = np.dtype(
    [
        ("tar", "<i4"),
        ("bucket", "<i4"),
        ("offset", "<i8"),
        ("json_bytes", "<i4"),
        ("tensors_at", "<i4"),
        ("tensor_bytes", "<i8"),
        ("frames", "<i4"),
        ("rows", "<i4"),
        ("columns", "<i4"),
        ("text_tokens", "<i4"),
        ("fps", "<f4"),
    ]
)
_REDO = "copy the folder again, or run `megatron-curr preprocess-video` again"


@dataclass(frozen=True, slots=True)
class Clip:
    """One sample as it was stored; an image is a clip of one latent frame."""

    latents_CTYX: Floats
    text_LE: Floats
    fps: float
    caption: str
    key: str
    metadata: Mapping[str, Any]


class VideoShards:
    """The samples of one folder, numbered from 0 in reading order. Safe to read from threads."""

    def __init__(self, folder: Path, name: str, manifest: VideoManifest) -> None:
        self.folder = folder
        self.name = name
        self.manifest = manifest
        self.bucket_names = tuple(manifest.buckets)
        self._paths = [folder / tar.name for tar in manifest.tars]

    @property
    def num_samples(self) -> int:
        return self.manifest.num_samples

    @cached_property
    def index(self) -> NDArray[Any]:
        """One ``INDEX`` row a sample, memory-mapped."""
        path = self.folder / INDEX_NAME
        try:
            index: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); {_REDO}") from error
        if index.dtype != INDEX or len(index) != self.num_samples:
            raise DataError(
                f"{path}: {len(index):,} rows of {index.dtype.itemsize} bytes, but the manifest "
                f"says {self.num_samples:,} samples of {INDEX.itemsize}; {_REDO}"
            )
        return index

    @cached_property
    def text_lengths(self) -> Ints:
        """Text tokens of every sample, [num_samples]."""
        return self.index["text_tokens"].astype(np.int64)

    def clips_of(self, bucket: str) -> Ints:
        """The numbers of a bucket's samples, increasing. ``KeyError`` for an unknown bucket."""
        return self._clips[bucket]

    @cached_property
    def _clips(self) -> dict[str, Ints]:
        numbers = np.asarray(self.index["bucket"])
        return {
            name: np.flatnonzero(numbers == bucket.number).astype(np.int64)
            for name, bucket in self.manifest.buckets.items()
        }

    @cached_property
    def empty_text_LE(self) -> Floats:
        """The features of the empty caption: what a dropped caption is replaced by."""
        path = self.folder / EMPTY_TEXT_NAME
        try:
            return unpack_tensors(path.read_bytes())["text"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{path}: cannot be read ({error}); {_REDO}") from error

    def read(self, number: int) -> Clip:
        """One sample. Raises ``DataError`` when the tar does not hold what the index says."""
        row = self.index[number]
        path = self._paths[row["tar"]]
        tensors_at, tensor_bytes = int(row["tensors_at"]), int(row["tensor_bytes"])
        try:
            with open(path, "rb", buffering=0) as stream:
                content = os.pread(stream.fileno(), tensors_at + tensor_bytes, int(row["offset"]))
            metadata = json.loads(content[: row["json_bytes"]])
            tensors = unpack_tensors(content[tensors_at:])
            latents_CTYX, text_LE = tensors["latents"], tensors["text"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path}: sample {number} at byte {row['offset']} cannot be read ({error}); {_REDO}"
            ) from error
        expected = (
            self.manifest.codec.channels,
            *(int(row[name]) for name in ("frames", "rows", "columns")),
        )
        if latents_CTYX.shape != expected or len(text_LE) != row["text_tokens"]:
            raise DataError(
                f"{path}: sample {number} holds latents {latents_CTYX.shape}, but the index says "
                f"{expected}: the two do not belong together; {_REDO}"
            )
        return Clip(
            latents_CTYX,
            text_LE,
            float(row["fps"]),
            str(metadata["caption"]),
            str(metadata["key"]),
            metadata,
        )


def open_video_shards(folder: str | Path, *, name: str | None = None) -> VideoShards:
    """The samples of one folder. Reads the manifest and the size of each tar, and nothing else.

    Raises ``DataError`` for a folder that is none, a tar that is missing or of another size, and
    one without samples.
    """
    folder = Path(folder)
    shards = VideoShards(folder, name or str(folder), read_video_manifest(folder))
    for tar in shards.manifest.tars:
        path = folder / tar.name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: listed in the manifest but not there; {_REDO}") from error
        if found != tar.num_bytes:
            raise DataError(
                f"{path}: {found:,} bytes, but the manifest says {tar.num_bytes:,}: the file is "
                f"cut short or was replaced; {_REDO}"
            )
    if shards.num_samples == 0:
        raise DataError(f"{folder}: holds no sample; see the rejects.jsonl of preprocessing")
    return shards


def check_latents(
    shards: VideoShards,
    *,
    compression: Sequence[int],
    channels: int,
    text_width: int,
    buckets: Mapping[str, tuple[int, int, int]],
) -> None:
    """Raise ``DataError`` where the shards are not what a recipe says its model is trained on.

    ``buckets`` are the source's buckets of the recipe: name to (height, width, frames) in pixels.
    """
    codec, text = shards.manifest.codec, shards.manifest.text_encoder
    wrong = [
        f"{what} {found}, but the recipe says {wanted}"
        for what, found, wanted in (
            ("compression", list(codec.compression), list(compression)),
            ("latent channels", codec.channels, channels),
            ("text features of width", text.width, text_width),
        )
        if found != wanted
    ]
    if wrong:
        raise DataError(
            f"{shards.folder}: made by codec {codec.name!r} and text encoder {text.name!r} with "
            f"{'; '.join(wrong)}: set data.compression and the model to the shards', or preprocess "
            "the clips with the codec and encoder the model is for"
        )
    for name, wanted_shape in buckets.items():
        bucket = shards.manifest.buckets.get(name)
        if bucket is None or bucket.num_samples == 0:
            known = ", ".join(f"{b} ({r.num_samples})" for b, r in shards.manifest.buckets.items())
            raise DataError(
                f"{shards.folder}: no sample of bucket {name!r}; it holds {known or 'none'}: take "
                "the bucket out of the source, or preprocess with it"
            )
        shape = (bucket.height, bucket.width, bucket.num_frames)
        if shape != tuple(wanted_shape):
            raise DataError(
                f"{shards.folder}: bucket {name!r} is {shape} (height, width, frames), but the "
                f"recipe says {tuple(wanted_shape)}: rename the bucket, or preprocess again"
            )


def check_same_encoders(sets: Sequence[VideoShards]) -> None:
    """Raise ``DataError`` where two folders' latents or text features are not the same space."""
    for other in sets[1:]:
        for field in ("codec", "text_encoder"):
            ours, theirs = getattr(sets[0].manifest, field), getattr(other.manifest, field)
            # The name says where it was loaded from, which may move.
            names = [name for name in ours.__slots__ if name != "name"]
            differ = [name for name in names if getattr(ours, name) != getattr(theirs, name)]
            if differ:
                raise DataError(
                    f"{other.folder} and {sets[0].folder}: made with {field} {theirs.name!r} and "
                    f"{ours.name!r}, whose {differ[-1]} differ ({getattr(theirs, differ[-1])!r} "
                    f"and {getattr(ours, differ[-1])!r}); a run needs one: preprocess again"
                )
