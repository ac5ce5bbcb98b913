"""What the disk says about a recipe's data before the run is planned; missing data is no error.

A plan is made where the job is prepared, which need not be where the shards are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.shards import ShardSet, open_shards
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.data.video_shards import open_video_shards
from megatron_curr.errors import DataError
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

DOCUMENTS_LOOKED_AT = 100_000
"""Of each source: lengths hardly change from one end of a corpus to the other."""


@dataclass(frozen=True)
class Survey:
    """What could be found, and in words what could not."""

    vocab_size: int | None  # the tokenizer's
    source_tokens: Mapping[str, int]
    document_tokens: NDArray[np.int64] | None  # [n] lengths of some documents of all sources
    remarks: tuple[str, ...]
    is_whole: bool  # whether every source and the tokenizer are here


def survey_data(recipe: Recipe | VideoRecipe) -> Survey:
    """Sizes of the sources and, where documents are isolated, lengths; no shard's tokens are read.

    Damaged shards become remarks too: what is damaged will be refused when the run starts.
    """
    return _of_video(recipe) if isinstance(recipe, VideoRecipe) else _of_text(recipe)


def _of_video(recipe: VideoRecipe) -> Survey:
    """Sizes by cell, ``source/bucket``, as latent patches."""
    sizes: dict[str, int] = {}
    missing: list[str] = []
    for name, source in recipe.data.sources.items():
        try:
            shards = open_video_shards(source.shards, name=name)
        except DataError:
            missing.append(f"{name} ({source.shards})")
            continue
        for bucket in sorted(source.buckets):
            clips = len(shards.clips_of(bucket))
            if clips:
                sizes[f"{name}/{bucket}"] = clips * recipe.sample_tokens(bucket)
    return Survey(None, sizes, None, tuple(_said(missing)), is_whole=not missing)


def _said(missing: list[str]) -> Iterator[str]:
    if missing:
        yield (
            f"no shards that can be opened here, so no epochs and no check of the data, for "
            f"{', '.join(missing)}"
        )


def _of_text(recipe: Recipe) -> Survey:
    remarks: list[str] = []
    vocab_size: int | None = None
    if recipe.model.vocab_size is None:
        try:
            vocab_size = load_tokenizer(recipe.data.tokenizer).vocab_size
        except DataError as error:
            remarks.append(f"no vocabulary: {error}")
    found: dict[str, ShardSet] = {}
    missing: list[str] = []
    for name, source in recipe.data.sources.items():
        try:
            found[name] = open_shards(source.shards, name=name)
        except DataError:
            missing.append(f"{name} ({source.shards})")
    remarks += _said(missing)
    lengths = None
    if recipe.data.isolate_documents and found:
        lengths = np.concatenate([_document_lengths(shards) for shards in found.values()])
    return Survey(
        vocab_size=vocab_size,
        source_tokens={name: shards.num_tokens for name, shards in found.items()},
        document_tokens=lengths,
        remarks=tuple(remarks),
        is_whole=not missing and Path(recipe.data.tokenizer).exists(),
    )


def _document_lengths(shards: ShardSet) -> NDArray[np.int64]:
    """[n] lengths of the first documents of the largest shard."""
    shard = max(shards.shards, key=lambda shard: shard.num_tokens)
    last = min(shard.num_documents, DOCUMENTS_LOOKED_AT)
    starts = shard.document_starts(0, last)
    lengths = np.diff(starts)
    return lengths[lengths > 0]
