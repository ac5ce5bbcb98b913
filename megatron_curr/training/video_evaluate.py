"""Held-out flow loss of every source and bucket, by timestep, without a trace in the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence

from megatron_curr.curriculum.lots import Cell
from megatron_curr.data.video_loader import HELDOUT_TIMESTEPS, heldout_batches, num_heldout
from megatron_curr.data.video_shards import VideoShards
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.step import Stepper

log = logging.getLogger(__name__)


class VideoEvaluator:
    """Knows the held-out shards; every rank reads its data-parallel share of them.

    Every sample is measured at the same timesteps with the same noise each time, without shift or
    task, so that the curves compare like with like over a run.
    """

    def __init__(
        self,
        recipe: VideoRecipe,
        cells: Sequence[Cell],
        heldout: Mapping[str, VideoShards],
        *,
        groups: Groups,
    ) -> None:
        self._recipe = recipe
        self._cells = tuple(cells)
        self._heldout = dict(heldout)
        self._groups = groups
        unheld = [
            cell.name
            for cell in self._cells
            if cell.source in self._heldout and not num_heldout(cell, self._heldout)
        ]
        if unheld:
            log.warning(
                "no held-out sample of %s: not evaluated (preprocess-video holds more files out "
                "with a higher --heldout-frac)",
                ", ".join(unheld),
            )

    @property
    def has_sources(self) -> bool:
        """Whether any source has held-out samples of a bucket that is read of it."""
        return any(num_heldout(cell, self._heldout) for cell in self._cells)

    def evaluate(self, stepper: Stepper) -> dict[str, float | None]:
        """``eval/...`` values; the same on every rank. Collective."""
        began_s = time.perf_counter()
        groups = self._groups
        batches = list(
            heldout_batches(
                self._recipe,
                self._cells,
                self._heldout,
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
            )
        )
        num_steps = len(HELDOUT_TIMESTEPS)
        loss = stepper.forward(
            lambda: iter(batches),
            num_batches=len(batches),
            num_groups=len(self._cells) * num_steps,
        )
        values: dict[str, float | None] = {"eval/time_s": time.perf_counter() - began_s}
        for label, name_of in (("source", "flow_mse"), ("bucket", "bucket_flow_mse")):
            for name in dict.fromkeys(getattr(cell, label) for cell in self._cells):
                own = [
                    number
                    for number, cell in enumerate(self._cells)
                    if getattr(cell, label) == name
                ]
                columns = {"": range(num_steps)}
                if label == "bucket":
                    columns |= {
                        f"_t{round(1000 * t):03d}": range(step, step + 1)
                        for step, t in enumerate(HELDOUT_TIMESTEPS)
                    }
                for suffix, steps in columns.items():
                    mean = loss.mean_of(*(number * num_steps + s for number in own for s in steps))
                    if mean is not None:
                        values[f"eval/{name}/{name_of}{suffix}"] = mean
        return values
