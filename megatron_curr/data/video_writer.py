"""Writing a folder of video shards: the same samples give the same bytes, and it appears whole.

A sample is packed to the bytes it takes in a tar (``pack_sample``), anywhere and in any process;
``VideoFolderWriter`` strings such bodies together. Tar headers carry no time and no owner.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.tensor_file import Floats, pack_tensors
from megatron_curr.data.video_manifest import (
    BucketRecord,
    CodecRecord,
    TarRecord,
    TextRecord,
    VideoManifest,
    write_video_manifest,
)
from megatron_curr.data.video_shards import EMPTY_TEXT_NAME, INDEX, INDEX_NAME

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_COPY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Sample:
    """What goes in: ``latents_CTYX`` normalised, ``text_LE`` unpadded with at least one token."""

    key: str
    bucket: str
    latents_CTYX: Floats
    text_LE: Floats
    fps: float
    caption: str
    metadata: Mapping[str, Any] = field(default_factory=dict)


def pack_sample(sample: Sample, bucket_number: int) -> tuple[bytes, NDArray[Any]]:
    """The tar members of one sample and its ``INDEX`` row [1], offsets counted from their start."""
    described = {
        "key": sample.key,
        "caption": sample.caption,
        "fps": sample.fps,
        "bucket": sample.bucket,
        **sample.metadata,
    }
    text = json.dumps(described, ensure_ascii=False, sort_keys=True).encode()
    tensors = pack_tensors({"latents": sample.latents_CTYX, "text": sample.text_LE})
    first = _member(f"{sample.key}.json", text)
    row = np.zeros(1, INDEX)
    row["bucket"] = bucket_number
    row["offset"] = _BLOCK
    row["json_bytes"] = len(text)
    row["tensors_at"] = len(first)  # from the end of one header to the end of the next
    row["tensor_bytes"] = len(tensors)
    row["frames"], row["rows"], row["columns"] = sample.latents_CTYX.shape[1:]
    row["text_tokens"] = len(sample.text_LE)
    row["fps"] = sample.fps
    return first + _member(f"{sample.key}.safetensors", tensors), row


def _member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % _BLOCK)


class VideoFolderWriter:
    """Tars of about ``tar_bytes``, their index and, last of all, the manifest.

    ``buckets``: name to (height, width, frames) in pixels; a sample's bucket number counts them.
    """

    def __init__(
        self, folder: Path, buckets: Mapping[str, tuple[int, int, int]], *, tar_bytes: int = 1 << 30
    ) -> None:
        self.folder = folder
        self.buckets = dict(buckets)
        self._tar_bytes = tar_bytes
        self._tars: list[TarRecord] = []
        self._rows: list[NDArray[Any]] = []
        self._stream: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._written = self._samples = 0
        folder.mkdir(parents=True, exist_ok=True)

    def append(self, body: BinaryIO, num_bytes: int, rows: NDArray[Any]) -> None:
        """Add packed samples: ``rows`` count their offsets from the beginning of ``body``."""
        if self._written and self._written + num_bytes > self._tar_bytes:
            self._close_tar()
        if self._stream is None:
            self._stream = open(self._path, "wb")  # noqa: SIM115 - closed by _close_tar
        placed = rows.copy()
        placed["tar"] = len(self._tars)
        placed["offset"] += self._written
        self._rows.append(placed)
        self._samples += len(rows)
        while piece := body.read(_COPY_BYTES):
            self._put(self._stream, piece)

    def add(self, samples: Iterable[Sample]) -> None:
        """Pack and append samples one by one."""
        numbers = {name: number for number, name in enumerate(self.buckets)}
        for sample in samples:
            body, row = pack_sample(sample, numbers[sample.bucket])
            self.append(io.BytesIO(body), len(body), row)

    def finish(
        self,
        codec: CodecRecord,
        text_encoder: TextRecord,
        *,
        empty_text_LE: Floats,
        options: Mapping[str, Any] | None = None,
    ) -> VideoManifest:
        """Close the last tar and write everything that describes them."""
        if self._stream is not None:
            self._close_tar()
        index = np.concatenate([np.empty(0, INDEX), *self._rows])
        content = io.BytesIO()
        np.save(content, index, allow_pickle=False)
        _write(self.folder / INDEX_NAME, content.getvalue())
        _write(self.folder / EMPTY_TEXT_NAME, pack_tensors({"text": empty_text_LE}))
        counts = np.bincount(index["bucket"], minlength=len(self.buckets)).tolist()
        manifest = VideoManifest(
            codec=codec,
            text_encoder=text_encoder,
            buckets={
                name: BucketRecord(*shape, num_samples=counts[number], number=number)
                for number, (name, shape) in enumerate(self.buckets.items())
            },
            tars=tuple(self._tars),
            index_sha256=hashlib.sha256(content.getvalue()).hexdigest(),
            options=dict(options or {}),
        )
        write_video_manifest(self.folder, manifest)
        return manifest

    @property
    def _path(self) -> Path:
        return self.folder / f"{len(self._tars):05d}.tar"

    def _put(self, stream: BinaryIO, piece: bytes) -> None:
        stream.write(piece)
        self._hash.update(piece)
        self._written += len(piece)

    def _close_tar(self) -> None:
        assert self._stream is not None
        self._put(self._stream, _END)
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._tars.append(
            TarRecord(self._path.name, self._samples, self._written, self._hash.hexdigest())
        )
        self._stream, self._hash = None, hashlib.sha256()
        self._written = self._samples = 0


def _write(path: Path, content: bytes) -> None:
    with open(path, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
