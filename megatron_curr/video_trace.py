"""Which clips a lot of a video run is made of, and when a clip is read: no model.

A clip goes by SOURCE/BUCKET:I, the I-th of its bucket in the source's shards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_curr.curriculum.ledger import Entry
from megatron_curr.curriculum.schedule import StepPlan
from megatron_curr.data.keyed import Words
from megatron_curr.data.video_data import VideoData, build_video_order
from megatron_curr.data.video_deal import LotDealer
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.errors import DataError
from megatron_curr.recipe.problems import did_you_mean
from megatron_curr.recipe.video_schema import VideoRecipe


class VideoTrace:
    """The order of a video run and the shards it reads."""

    def __init__(self, recipe: VideoRecipe, data: VideoData, ledger: Sequence[Entry]) -> None:
        self.data = data
        self.order: VideoOrder = build_video_order(recipe, self.data, ledger)
        self.schedule = self.order.schedule
        self._dealer = LotDealer(recipe, self.order, self.data.train)

    def row(self, position: int, *, with_text: bool) -> dict[str, Any]:
        """What there is to say of a lot; captions are read where they are asked for."""
        lot = self.order.lot(position)
        cell, draws = self.order.cells[lot.cell], self._dealer.draw(lot)
        clips = lot.clip.tolist()
        row: dict[str, Any] = {
            "position": position,
            "consumed_tokens": lot.consumed_tokens,
            "phase": lot.stretch.phase,
            "source": cell.source,
            "bucket": cell.bucket,
            "epochs": sorted(set(lot.epoch.tolist())),
            "clips": clips,
            "timesteps": [round(1000 * t, 3) for t in draws.t.tolist()],
            "given_frames": (~draws.mask_BT).sum(axis=1).tolist(),
            "dropped_captions": draws.dropped.tolist(),
        }
        if with_text:
            shards = self.data.train[cell.source]
            numbers = shards.clips_of(cell.bucket)[lot.clip].tolist()
            row["captions"] = [shards.read(number).caption for number in numbers]
        return row

    def identities(self, plan: StepPlan) -> Words:
        """[num_samples]: what a step reads, as its row in the metrics counts it."""
        positions = range(plan.position, plan.position + plan.num_samples)
        return np.concatenate([self.order.identities(self.order.lot(at)) for at in positions])

    def positions_of(self, clip: str) -> list[int]:
        """Every lot that holds ``SOURCE/BUCKET:I``, ascending. Raises ``DataError``."""
        name, _, number = clip.rpartition(":")
        known = [cell.name for cell in self.order.cells]
        if name not in known or not number.isdecimal():
            raise DataError(
                f"--document {clip}: write SOURCE/BUCKET:I, such as {known[0]}:0; "
                f"{did_you_mean(name, known, what='buckets')}"
            )
        cell = known.index(name)
        if int(number) >= self.order.num_clips[cell]:
            last = int(self.order.num_clips[cell]) - 1
            raise DataError(f"--document {clip}: {name} has clips 0 to {last:,}")
        positions: list[int] = np.unique(self.order.visits_of(cell, int(number))[:, 0]).tolist()
        return positions


def row_as_json(row: dict[str, Any]) -> str:
    """One line for a script."""
    return json.dumps(row, ensure_ascii=False)


def row_as_text(row: dict[str, Any]) -> Iterator[str]:
    """One line for a person, and one a caption where they were asked for."""
    epochs = "-".join(str(epoch) for epoch in row["epochs"])
    yield (
        f"lot {row['position']}  token {row['consumed_tokens']}  {row['phase']}  "
        f"{row['source']}/{row['bucket']}  epoch {epochs}  "
        f"clips {', '.join(map(str, row['clips']))}"
    )
    for clip, caption in zip(row["clips"], row.get("captions", []), strict=False):
        yield f"  {clip}: {caption}"
