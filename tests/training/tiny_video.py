"""Tiny video shards, model and recipe: images and two shapes of clips, a ramp of buckets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_curr.data.video_manifest import CodecRecord, TextRecord
from tests.data.video_folders import write_drawn_folder

BUCKETS = {"image": (32, 32, 1), "clip": (32, 32, 24), "wide": (32, 64, 16)}
CHANNELS, TEXT_WIDTH = 4, 12
CODEC = CodecRecord(
    "haar", "0" * 64, (8, 8, 8), CHANNELS, (0.0,) * CHANNELS, (1.0,) * CHANNELS, (-1.0, 1.0)
)
TEXT = TextRecord("hashed:12", "1" * 64, TEXT_WIDTH, 16)
# Tokens of a sample: image 4, clip 12, wide 16; of a lot: 32, 48, 64.
SOURCES = {"shapes": ("image", "clip"), "films": ("clip", "wide")}
COUNTS = {"image": 40, "clip": 24, "wide": 20}


MODEL = {
    "num_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "text_hidden_size": TEXT_WIDTH,
    "max_text_tokens": 16,
    "timestep_frequencies": 32,
}


def write_video_corpus(
    folder: Path, *, codec: CodecRecord = CODEC, text: TextRecord = TEXT
) -> None:
    """Two sources of drawn latents, each with its held-out part."""
    for number, (name, buckets) in enumerate(SOURCES.items()):
        for split, share in (("train", 1), ("heldout", 4)):
            write_drawn_folder(
                folder / name / split,
                {bucket: COUNTS[bucket] // share for bucket in buckets},
                buckets={bucket: BUCKETS[bucket] for bucket in buckets},
                codec=codec,
                text=text,
                seed=10 * number + share,
            )


def video_recipe_values(corpus: Path, run_folder: Path) -> dict[str, Any]:
    """Two phases of some twenty steps in all: images and clips, then longer ones ramped in."""
    lots = {"image": 8, "clip": 4, "wide": 4}
    return {
        "name": "tiny_video",
        "seed": 11,
        "run_folder": str(run_folder),
        "model": dict(MODEL),
        "data": {
            "buckets": {
                name: {
                    "height": height,
                    "width": width,
                    "num_frames": frames,
                    "batch_samples": lots[name],
                }
                for name, (height, width, frames) in BUCKETS.items()
            },
            "sources": {
                name: {
                    "shards": str(corpus / name / "train"),
                    "heldout": str(corpus / name / "heldout"),
                    "buckets": list(buckets),
                    "max_epochs": 20,
                }
                for name, buckets in SOURCES.items()
            },
        },
        "curriculum": {
            "phases": [
                {
                    "name": "small",
                    "tokens": 1536,
                    "mixture": {"shapes": 0.75, "films": 0.25},
                    "buckets": {"image": 1.0, "clip": 1.0},
                    "global_batch_tokens": 128,
                    "learning_rate": {"from": 0.0, "to": 3e-3, "over": 384},
                },
                {
                    "name": "large",
                    "tokens": 1536,
                    "mixture": {"shapes": 0.5, "films": 0.5},
                    "buckets": {"to": {"image": 0.2, "clip": 0.4, "wide": 0.4}, "over": 768},
                    "tasks": {"t2v": 0.5, "i2v": 0.2, "head": 0.1, "tail": 0.1, "random": 0.1},
                    "global_batch_tokens": 192,
                },
            ]
        },
        "parallel": {"micro_batch_tokens": 48},
        "training": {"precision": "fp32", "ema_decay": 0.9},
        "checkpoint": {"every_tokens": 640, "keep_last": 2},
        "evaluation": {"every_tokens": 1536, "tokens_per_source": 48},
    }
