"""Folders of video shards with drawn latents, for tests that need no codec."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from megatron_curr.data.video_manifest import CodecRecord, TextRecord, VideoManifest
from megatron_curr.data.video_writer import Sample, VideoFolderWriter

CODEC = CodecRecord("haar", "0" * 64, (8, 8, 8), 24, (0.0,) * 24, (1.0,) * 24, (-1.0, 1.0))
TEXT = TextRecord("hashed:64", "1" * 64, 64, 300)
BUCKETS = {"image32": (32, 32, 1), "clip32": (32, 32, 32), "wide": (32, 64, 16)}


def drawn_samples(
    counts: Mapping[str, int],
    *,
    buckets: Mapping[str, tuple[int, int, int]] = BUCKETS,
    channels: int = CODEC.channels,
    text_width: int = TEXT.width,
    seed: int = 0,
) -> Iterator[Sample]:
    """Normal latents; texts of 1 to 9 tokens; buckets take turns while they last."""
    draws = np.random.default_rng(seed)
    left = dict(counts)
    number = 0
    while any(left.values()):
        for bucket in [name for name, count in left.items() if count]:
            left[bucket] -= 1
            height, width, frames = buckets[bucket]
            shape = (channels, -(-frames // 8), height // 8, width // 8)
            yield Sample(
                key=f"{number:08d}-{bucket}",
                bucket=bucket,
                latents_CTYX=draws.standard_normal(shape, np.float32),
                text_LE=draws.standard_normal((1 + number % 9, text_width), np.float32),
                fps=float(8 * (1 + number % 3)),
                caption=f"clip {number} of {bucket}",
                metadata={"file": f"{number}.mp4"},
            )
            number += 1


def write_drawn_folder(
    folder: Path,
    counts: Mapping[str, int],
    *,
    buckets: Mapping[str, tuple[int, int, int]] = BUCKETS,
    codec: CodecRecord = CODEC,
    text: TextRecord = TEXT,
    tar_bytes: int = 1 << 20,
    seed: int = 0,
) -> VideoManifest:
    """A whole folder: ``counts`` samples of each bucket."""
    writer = VideoFolderWriter(folder, buckets, tar_bytes=tar_bytes)
    writer.add(
        drawn_samples(
            counts, buckets=buckets, channels=codec.channels, text_width=text.width, seed=seed
        )
    )
    empty = np.zeros((1, text.width), np.float32)
    return writer.finish(codec, text, empty_text_LE=empty)
