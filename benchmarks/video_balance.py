"""How even the work of data-parallel ranks is, and how much of it is padding, for five shapes.

    python -m benchmarks.video_balance          # a few seconds; reads and writes no files

The order, the lots and the dealing are those of training; only latents are not read. The model is
the 10B one on 64 data-parallel ranks of TP 4 x CP 2. Texts are drawn as long as captions of a
paragraph are: 160 tokens on average, 20 to 300. The work of a micro-step is its FLOPs in closed
form with all padding; ranks wait for the one with most. Beside ours: samples of the same mixture
dealt to ranks one at a time as they come, which is what a shuffled list of clips does.
Exit code 1 when a target is missed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron_curr.curriculum.ledger import ledger_schedule, open_ledger
from megatron_curr.curriculum.lots import Cell, VideoPlanner
from megatron_curr.data.keyed import Ints
from megatron_curr.data.video_deal import LotDealer
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.plan.video_flops import sample_flops
from megatron_curr.recipe.video_schema import VideoRecipe

DP_SIZE, TP_SIZE, CP_SIZE = 64, 4, 2
CLIPS = 20_000
NUM_STEPS = 40
MOST_SPREAD_FRAC, MOST_PADDING_FRAC = 0.05, 0.02
# height, width, frames, samples of a lot, weight: 512 px images to five seconds of 720p
SHAPES = {
    "512px image": (512, 512, 1, 2048, 0.10),
    "720p image": (720, 1280, 1, 1024, 0.10),
    "360p 5 s": (360, 640, 112, 256, 0.30),
    "480p 5 s": (480, 848, 112, 128, 0.25),
    "720p 5 s": (720, 1280, 112, 64, 0.25),
}


@dataclass(frozen=True)
class ListedClips:
    """What the order and the dealing ask of shards: lengths of texts, and which clips fit."""

    text_lengths: Ints

    @property
    def empty_text_LE(self) -> np.ndarray:
        """One token."""
        return np.zeros((1, 4096), np.float32)

    def clips_of(self, bucket: str) -> Ints:
        """As many for every shape."""
        first = list(NAMES).index(bucket) * CLIPS
        return np.arange(first, first + CLIPS, dtype=np.int64)


NAMES = {name.replace(" ", "_"): shape for name, shape in SHAPES.items()}


def recipe() -> VideoRecipe:
    """The mixture as one phase."""
    buckets = {
        name: {"height": height, "width": width, "num_frames": frames, "batch_samples": samples}
        for name, (height, width, frames, samples, _) in NAMES.items()
    }
    phase = {
        "name": "mixed",
        "tokens": "2B",
        "mixture": {"clips": 1},
        "buckets": {name: shape[4] for name, shape in NAMES.items()},
        "global_batch_tokens": "25M",
        "learning_rate": 1e-4,
    }
    return VideoRecipe.model_validate(
        {
            "name": "balance",
            "model": {"preset": "dit_10b"},
            "data": {
                "buckets": buckets,
                "sources": {"clips": {"shards": "-", "buckets": list(NAMES), "max_epochs": 100}},
            },
            "curriculum": {"phases": [phase]},
            "parallel": {
                "micro_batch_tokens": 4096,
                "tensor_model_parallel_size": TP_SIZE,
                "context_parallel_size": CP_SIZE,
                "sequence_parallel": True,
            },
            "checkpoint": {"every_tokens": "1B"},
            "evaluation": {"every_tokens": "1B"},
        }
    )


def padded(num_patches: int) -> int:
    """Places of a sequence with start and end token on this layout."""
    multiple = math.lcm(2 * CP_SIZE, CP_SIZE * TP_SIZE)
    return -(-(num_patches + 2) // multiple) * multiple


@dataclass
class MicroStep:
    """What all ranks do at a time: FLOPs of each, tokens of all with and without padding."""

    cell: Cell
    flops: np.ndarray
    tokens: float
    places: float


def micro_steps(run: VideoRecipe, texts: ListedClips) -> Iterator[MicroStep]:
    """Those of the first steps of the run."""
    planner = VideoPlanner(run)
    schedule = ledger_schedule(open_ledger(run.curriculum), planner)
    sizes = {cell.name: CLIPS for cell in planner.cells}
    order = VideoOrder(schedule, sizes, recipe=run, planner=planner)
    dealers = [
        LotDealer(run, order, {"clips": texts}, dp_rank=rank, dp_size=DP_SIZE)
        for rank in range(DP_SIZE)
    ]
    clock = 0
    for _ in range(NUM_STEPS):
        plan = schedule.at(clock)
        clock = plan.next_consumed_tokens
        for position in range(plan.position, plan.position + plan.num_samples):
            lot = order.lot(position)
            cell, dropped = order.cells[lot.cell], dealers[0].draw(lot).dropped
            lengths = texts.text_lengths[texts.clips_of(cell.bucket)[lot.clip]]
            lengths = np.where(dropped, 1, lengths)
            for shares in zip(*(dealer.shares(lot, dropped) for dealer in dealers), strict=True):
                longest = np.array([lengths[share].max() for share in shares])
                count = len(shares[0])
                yield MicroStep(
                    cell,
                    flops=count * np.array([flops_of(run, cell, int(text)) for text in longest]),
                    tokens=sum(lengths[share].sum() for share in shares)
                    + DP_SIZE * count * (cell.sample_tokens + 2),
                    places=count * (longest.sum() + DP_SIZE * padded(cell.sample_tokens)),
                )


def flops_of(run: VideoRecipe, cell: Cell, text_tokens: int) -> float:
    """Of one sample with its padding."""
    patches = padded(cell.sample_tokens) - 2
    return sample_flops(run.model, num_patches=patches, text_tokens=text_tokens)


def spread(flops: np.ndarray) -> float:
    """How much more the busiest rank does than the idlest, over the mean."""
    return float(np.ptp(flops) / flops.mean())


def dealt_as_they_come(run: VideoRecipe, texts: ListedClips) -> float:
    """Mean share of a micro-step that a rank waits when each takes the next clip, of any shape."""
    cells = VideoPlanner(run).cells
    weights = np.array([NAMES[cell.bucket][4] / cell.sample_tokens for cell in cells])
    draws = np.random.default_rng(1)
    picked = draws.choice(len(cells), (400, DP_SIZE), p=weights / weights.sum())
    flops = np.array([flops_of(run, cell, 160) for cell in cells])[picked]
    return float((1 - flops.mean(axis=1) / flops.max(axis=1)).mean())


def main() -> int:
    """Print the table; 1 when a target is missed."""
    draws = np.random.default_rng(0)
    lengths = np.clip(draws.normal(160, 60, CLIPS * len(NAMES)), 20, 300).astype(np.int64)
    run, texts = recipe(), ListedClips(lengths)
    steps = list(micro_steps(run, texts))
    table = Table(title=f"{len(steps)} micro-steps of {DP_SIZE} data-parallel ranks")
    for column in ("shape", "tokens", "FLOPs", "spread, worst", "spread, mean", "padding"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    worst, tokens, places = 0.0, 0.0, 0.0
    for name in NAMES:
        own = [step for step in steps if step.cell.bucket == name]
        spreads = [spread(step.flops) for step in own]
        own_tokens, own_places = sum(s.tokens for s in own), sum(s.places for s in own)
        worst, tokens, places = max(worst, *spreads), tokens + own_tokens, places + own_places
        flops = sample_flops(run.model, num_patches=own[0].cell.sample_tokens, text_tokens=160)
        table.add_row(
            name.replace("_", " "),
            f"{own[0].cell.sample_tokens:,}",
            f"{flops:.2e}",
            f"{max(spreads):.2%}",
            f"{np.mean(spreads):.3%}",
            f"{own_places / own_tokens - 1:.2%}",
        )
    padding = places / tokens - 1
    table.add_row("all", "", "", f"{worst:.2%}", "", f"{padding:.2%}", style="bold")
    Console(width=100).print(table)
    print(
        f"clips dealt as they come: ranks wait {dealt_as_they_come(run, texts):.0%} of their time"
    )
    return int(worst > MOST_SPREAD_FRAC or padding > MOST_PADDING_FRAC)


if __name__ == "__main__":
    sys.exit(main())
