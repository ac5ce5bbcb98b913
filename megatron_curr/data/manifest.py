"""``manifest.json`` of a shard folder: what made the shards, and how large each one is.

With it a folder of thousands of shards opens without reading a single index, token ids are known
to fit the tokenizer before the run starts, and a damaged copy is found by its size or its sha256.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_curr.durable import write_durably
from megatron_curr.errors import DataError

FILE_NAME = "manifest.json"
FORMAT = "megatron-curr shards"
VERSION = 1


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One finished shard. ``max_token_id`` is -1 for a shard without tokens; ``table_bytes`` is 0
    where no document table lies beside it, ``masked_sha256`` empty where every token carries
    loss."""

    name: str
    num_documents: int
    num_sequences: int
    num_tokens: int
    max_token_id: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    table_bytes: int = 0
    table_sha256: str = ""
    masked_sha256: str = ""


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """The tokenizer that made the shards; ``sha256`` is of its model file. Every document begins
    with ``bos_ids``: usually none or one."""

    name: str
    sha256: str
    vocab_size: int
    eod_id: int
    bos_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything known about the shards of one folder, in reading order."""

    dtype: str
    tokenizer: TokenizerRecord | None
    shards: tuple[ShardRecord, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(shard.num_tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` beside the shards: complete or not at all."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "num_tokens": manifest.num_tokens,
        "num_documents": manifest.num_documents,
        **asdict(manifest),
    }
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_durably(folder / FILE_NAME, text + "\n")


def _tokenizer_record(content: Mapping[str, Any]) -> TokenizerRecord:
    return TokenizerRecord(**{**content, "bos_ids": tuple(content.get("bos_ids", ()))})


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a shard folder; ``None`` where there is none, or another tool's.

    Raises ``DataError`` for one that is cut short or of an unknown version.
    """
    path = folder / FILE_NAME
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); run `megatron-curr preprocess` again, or delete "
            "the file to open the shards by their indexes alone"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return None
    if content.get("version") != VERSION:
        raise DataError(
            f"{path}: manifest version {content.get('version')!r}, but this release reads "
            f"{VERSION}; use the release that wrote it or preprocess again"
        )
    try:
        tokenizer = content["tokenizer"]
        return Manifest(
            dtype=content["dtype"],
            tokenizer=None if tokenizer is None else _tokenizer_record(tokenizer),
            shards=tuple(ShardRecord(**shard) for shard in content["shards"]),
            options=content["options"],
        )
    except (KeyError, TypeError) as error:
        raise DataError(
            f"{path}: is not complete ({error}); run `megatron-curr preprocess` again"
        ) from error
