"""The shards of a video recipe, opened and checked against it, and the order they are read in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_curr.curriculum.ledger import Entry, ledger_schedule
from megatron_curr.curriculum.lots import VideoPlanner
from megatron_curr.data.video_manifest import FILE_NAME
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.data.video_shards import (
    VideoShards,
    check_latents,
    check_same_encoders,
    open_video_shards,
)
from megatron_curr.errors import DataError
from megatron_curr.recipe.video_schema import VideoRecipe


@dataclass(frozen=True, slots=True)
class VideoData:
    """Open shards by source name."""

    train: dict[str, VideoShards]
    heldout: dict[str, VideoShards]


def open_video_data(recipe: VideoRecipe) -> VideoData:
    """Open every folder of the recipe.

    Raises ``DataError`` for latents or texts of another codec, channel count, normalisation or
    encoder than the model's or another folder's, and for a bucket that no sample fits; a held-out
    folder may lack buckets.
    """
    data = VideoData(
        train={
            name: open_video_shards(source.shards, name=name)
            for name, source in recipe.data.sources.items()
        },
        heldout={
            name: _open_heldout(name, source.heldout)
            for name, source in recipe.data.sources.items()
            if source.heldout is not None
        },
    )
    for name, source in recipe.data.sources.items():
        _check(recipe, data.train[name], source.buckets)
        if name in data.heldout:
            shards = data.heldout[name]
            held_out = {b for b, record in shards.manifest.buckets.items() if record.num_samples}
            _check(recipe, shards, [b for b in source.buckets if b in held_out])
    check_same_encoders([*data.train.values(), *data.heldout.values()])
    return data


def build_video_order(recipe: VideoRecipe, data: VideoData, ledger: Sequence[Entry]) -> VideoOrder:
    """The order of the run that the ledger's editions add up to. Raises ``RecipeError``."""
    planner = VideoPlanner(recipe)
    num_clips = {
        cell.name: len(data.train[cell.source].clips_of(cell.bucket)) for cell in planner.cells
    }
    schedule = ledger_schedule(ledger, planner)
    return VideoOrder(schedule, num_clips, recipe=recipe, planner=planner)


def _open_heldout(source: str, folder: str) -> VideoShards:
    try:
        return open_video_shards(folder, name=f"{source} (held out)")
    except DataError as error:
        if (Path(folder) / FILE_NAME).is_file():
            raise
        raise DataError(
            f"data.sources.{source}.heldout: {error}. Where preprocess-video has held no file out "
            "there is no such folder: raise its --heldout-frac, give it more files, or leave "
            "heldout out of the recipe"
        ) from error


def _check(recipe: VideoRecipe, shards: VideoShards, buckets: Sequence[str]) -> None:
    shapes = {name: recipe.data.buckets[name] for name in buckets}
    check_latents(
        shards,
        compression=recipe.data.compression,
        channels=recipe.model.in_channels,
        text_width=recipe.model.text_hidden_size,
        buckets={
            name: (shape.height, shape.width, shape.num_frames) for name, shape in shapes.items()
        },
    )
    longest = int(shards.text_lengths.max())
    if longest > recipe.model.max_text_tokens:
        raise DataError(
            f"{shards.folder}: a text has {longest} tokens, more than model.max_text_tokens="
            f"{recipe.model.max_text_tokens}; set that to {longest}, or preprocess again"
        )
