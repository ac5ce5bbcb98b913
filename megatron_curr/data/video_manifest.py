"""``manifest.json`` of a folder of video shards: what made the latents and text features in it.

Latents are stored normalised, once: the constants stand here and nothing applies them again but the
codec's ``decode``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_curr.durable import write_durably
from megatron_curr.errors import DataError

FILE_NAME = "manifest.json"
FORMAT = "megatron-curr video shards"
VERSION = 1
_REDO = "run `megatron-curr preprocess-video` again"


@dataclass(frozen=True, slots=True)
class CodecRecord:
    """The codec that made the latents.

    ``name`` opens it again (``load_codec``); ``sha256`` is over its weights and settings.
    ``compression`` is pixels a latent along time, height and width. A stored latent is
    ``(raw - mean) / std``, a channel at a time; ``input_range`` is what pixels 0 and 255 become.
    """

    name: str
    sha256: str
    compression: tuple[int, int, int]
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_range: tuple[float, float]


@dataclass(frozen=True, slots=True)
class TextRecord:
    """The text encoder; ``name`` opens it again (``load_text_encoder``)."""

    name: str
    sha256: str
    width: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class BucketRecord:
    """One shape of samples: pixels, how many of them the folder holds, its number in the index."""

    height: int
    width: int
    num_frames: int
    num_samples: int
    number: int


@dataclass(frozen=True, slots=True)
class TarRecord:
    """One finished tar."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class VideoManifest:
    """Everything known about one folder, tars in reading order."""

    codec: CodecRecord
    text_encoder: TextRecord
    buckets: Mapping[str, BucketRecord]
    tars: tuple[TarRecord, ...]
    index_sha256: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return sum(tar.num_samples for tar in self.tars)

    @property
    def encoders(self) -> dict[str, str]:
        """A digest of all that says what latents and text features mean, but not of its place."""
        return {
            what: hashlib.sha256(
                json.dumps({**asdict(record), "name": ""}, sort_keys=True).encode()
            ).hexdigest()
            for what, record in (("codec", self.codec), ("text encoder", self.text_encoder))
        }


def write_video_manifest(folder: Path, manifest: VideoManifest) -> None:
    """Write ``manifest.json``: complete or not at all."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_samples": manifest.num_samples,
        **asdict(manifest),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_durably(folder / FILE_NAME, text + "\n")


def read_video_manifest(folder: Path) -> VideoManifest:
    """Raises ``DataError`` where there is none, or one that is cut short or of another kind."""
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        below = sorted(found.parent.name for found in folder.glob(f"*/{FILE_NAME}"))
        hint = f"; there is one in {folder / below[0]}" if below else f"; {_REDO}"
        raise DataError(f"{path}: not there, so this is no folder of video shards{hint}") from error
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REDO}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DataError(f"{path}: describes {found!r} and not {FORMAT!r}; check data.sources")
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: manifest version {content.get('version')!r}, but this release reads "
            f"{VERSION}; use the release that wrote it, or {_REDO}"
        )
    try:
        codec = content["codec"]
        for name in ("compression", "mean", "std", "input_range"):
            codec[name] = tuple(codec[name])
        return VideoManifest(
            codec=CodecRecord(**codec),
            text_encoder=TextRecord(**content["text_encoder"]),
            buckets=dict(sorted(_read_buckets(content["buckets"]))),
            tars=tuple(TarRecord(**tar) for tar in content["tars"]),
            index_sha256=content["index_sha256"],
            options=content["options"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not complete ({error}); {_REDO}") from error


def _read_buckets(table: Mapping[str, Any]) -> Iterator[tuple[str, BucketRecord]]:
    """Manifests that give no number list the buckets in the order of their numbers."""
    for place, (name, values) in enumerate(table.items()):
        yield name, BucketRecord(**{"number": place, **values})
