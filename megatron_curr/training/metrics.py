"""Metrics: every name once, with its unit; ``metrics.jsonl``; TensorBoard and W&B by choice.

Names are ``area/what_unit``. ``<source>`` stands for a source of the recipe, ``<bucket>`` for one
of its shapes. A row is one JSON
object: ``step``, ``consumed_tokens``, ``time_s`` (Unix time), ``phase``, then values.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_curr.incarnation.fence import Pen
from megatron_curr.recipe.schema import Recipe
from megatron_curr.training.loggers import Logger

log = logging.getLogger(__name__)

Value = float | str | None  # a number, a digest, or that there is none

METRICS = {
    "run/num_ranks": "ranks of a start; one such row a start, at the token it begins from",
    "run/dp_size": "data-parallel replicas of that start",
    "run/tp_size": "tensor-parallel ranks of a replica",
    "run/pp_size": "pipeline stages of a replica",
    "run/cp_size": "context-parallel ranks of a replica",
    "train/loss_nats_per_token": "mean over the step's tokens that carry loss; null of none",
    "train/<source>/loss_nats_per_token": "the same, over this source's tokens",
    "train/flow_mse": "mean squared error of the velocity, per latent number, over samples",
    "train/<source>/flow_mse": "the same, over this source's samples",
    "train/<bucket>/bucket_flow_mse": "the same, over this bucket's samples",
    "train/step_flops": "model FLOPs of the step, all ranks, without recomputation",
    "train/grad_norm": "global norm before clipping; null where nothing counts",
    "train/learning_rate": "as set for the step",
    "train/weight_decay": "as set for the step",
    "train/global_batch_tokens": "tokens in the step, all ranks",
    "train/seq_length_tokens": "of every sample in the step",
    "train/nonfinite_steps": "updates refused so far for a non-finite loss or gradient",
    "train/nonfinite_first_position": "first sample of a refused step",
    "train/nonfinite_num_samples": "samples of a refused step",
    "perf/step_time_s": "data wait, forward, backward, update; without evaluation and checkpoint",
    "perf/tokens_per_s": "over perf/step_time_s, all ranks",
    "perf/data_wait_s": "rank 0 waiting for the loader",
    "perf/slowest_rank": "of a step in fifty, the rank that came last to the others",
    "perf/slowest_rank_ratio": "its busy time over the median of all ranks",
    "perf/collective_wait_s": "median wait of the ranks for the slowest one in that step",
    "perf/mfu_frac": "model FLOP/s over the peak of all devices",
    "data/samples_digest": "16 hex digits: which samples the step read, as `trace --verify` counts",
    "data/<source>/consumed_tokens": "since the start of the run",
    "data/<source>/epochs": "passes over the source since the start of the run",
    "eval/<source>/loss_nats_per_token": "on held-out text; null where none of it counts",
    "data/<bucket>/bucket_consumed_tokens": "since the start of the run",
    "eval/<source>/flow_mse": "on held-out samples, at four timesteps from 125 to 875",
    "eval/<bucket>/bucket_flow_mse": "the same, over this bucket's samples",
    "eval/<bucket>/bucket_flow_mse_t125": "the same at timestep 125 (of 1000, which is noise)",
    "eval/<bucket>/bucket_flow_mse_t375": "at 375",
    "eval/<bucket>/bucket_flow_mse_t625": "at 625",
    "eval/<bucket>/bucket_flow_mse_t875": "at 875",
    "eval/time_s": "the evaluation of all sources",
    "checkpoint/blocked_s": "training stood still for the save",
    "checkpoint/total_s": "from the decision to the published checkpoint",
    "checkpoint/size_bytes": "all files of the checkpoint",
}


class MetricsFile:
    """Appends rows to ``metrics.jsonl``; a disk without room delays rows, never stops the run."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._waiting: list[bytes] = []

    def write(self, row: dict[str, Any]) -> None:
        """Append one row: its whole line gets into the file, or none of it for now."""
        self._waiting.append(json.dumps(row, allow_nan=False).encode() + b"\n")
        while self._waiting:
            size_bytes = os.fstat(self._descriptor).st_size
            try:
                if os.write(self._descriptor, self._waiting[0]) != len(self._waiting[0]):
                    raise OSError("the disk took part of a row")
            except OSError as error:
                os.ftruncate(self._descriptor, size_bytes)
                if len(self._waiting) == 1:
                    log.warning("metrics.jsonl takes no rows (%s); keeping them in memory", error)
                return
            del self._waiting[0]

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class Metrics:
    """Where rows go. On ranks other than 0 there is no file and ``write`` does nothing.

    ``loggers`` read the file by themselves; they are only looked after here.
    """

    def __init__(self, file: MetricsFile | None = None, loggers: Sequence[Logger] = ()) -> None:
        self._file = file
        self._loggers = loggers

    def write(
        self, values: Mapping[str, Value], *, step: int, consumed_tokens: int, phase: str
    ) -> None:
        """Write one row; names are checked against ``METRICS``.

        None, of which there is no value, is null; so is what is not finite.
        """
        if self._file is None:
            return
        row: dict[str, Any] = {
            "step": step,
            "consumed_tokens": consumed_tokens,
            "time_s": time.time(),
            "phase": phase,
        }
        for name, value in values.items():
            check_name(name)
            is_told = isinstance(value, str) or (value is not None and math.isfinite(value))
            row[name] = value if is_told else None
        self._file.write(row)
        for logger in self._loggers:
            logger.look_after()

    def close(self, *, waits: bool = True) -> None:
        """Close the file and let the loggers end; ``waits`` gives them time to send the rest."""
        if self._file is not None:
            self._file.close()
        for logger in self._loggers:
            logger.end()
        for logger in self._loggers if waits else ():
            logger.wait()


def build_metrics(
    recipe: Recipe, *, path: Path, logs: Path, incarnation: int, resumed_tokens: int
) -> Metrics:
    """The file, and the loggers that the recipe asks for; for rank 0.

    ``resumed_tokens`` is -1 for a run that begins from nothing.
    """
    wanted = {
        "tensorboard": recipe.logging.tensorboard,
        "wandb": recipe.logging.wandb_project is not None,
    }
    file = MetricsFile(path)
    return Metrics(
        file,
        [
            Logger(kind, [str(path.parent), str(incarnation), str(resumed_tokens)], logs)
            for kind, is_wanted in wanted.items()
            if is_wanted
        ],
    )


def check_name(name: str) -> None:
    """Raise ``KeyError`` for a name that ``METRICS`` does not list."""
    area, _, rest = name.partition("/")
    what = rest.rpartition("/")[2]
    known = {name, f"{area}/<source>/{what}", f"{area}/<bucket>/{what}"}
    if known.isdisjoint(METRICS):
        raise KeyError(f"metric {name!r} is not registered in METRICS")


@dataclass(frozen=True)
class LostWork:
    """Rows behind the checkpoint that a start resumes from: their steps are taken again."""

    num_rows: int = 0
    num_tokens: int = 0
    time_s: float = 0.0  # of the steps


def drop_rows_after(path: Path, consumed_tokens: int, *, aside: Path, pen: Pen) -> LostWork:
    """Move rows written after this token into the folder ``aside``; what they stood for.

    -1 moves all of them: a run that begins from nothing owes nothing to an earlier try. A run that
    resumes writes them again. A torn last line goes with them. The file is always made anew: a
    stale incarnation that still has it open goes on writing to what is no longer there.
    """
    if not path.is_file():
        return LostWork()
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _clock_of(line) <= consumed_tokens]
    stale = [line for line in lines if _clock_of(line) > consumed_tokens]
    if stale:
        aside.mkdir(parents=True, exist_ok=True)
        (aside / f"metrics_after_{consumed_tokens}_{int(time.time())}.jsonl").write_bytes(
            b"".join(stale)
        )
    pen.write(path, b"".join(kept).decode())
    start = max(consumed_tokens, 0)
    clocks = [clock for line in stale if math.isfinite(clock := _clock_of(line))]
    return LostWork(
        num_rows=len(stale),
        num_tokens=int(max(clocks, default=start)) - start,
        time_s=sum(
            float(json.loads(line).get("perf/step_time_s", 0.0))
            for line in stale
            if math.isfinite(_clock_of(line))
        ),
    )


def last_clock(path: Path) -> int:
    """The greatest token in the rows of a run; 0 without any."""
    if not path.is_file():
        return 0
    clocks = map(_clock_of, path.read_bytes().splitlines())
    return int(max((clock for clock in clocks if math.isfinite(clock)), default=0))


def last_evaluated_tokens(path: Path) -> int:
    """The clock of the last evaluation in the file; -1 where there is none."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = (line for line in reversed(lines) if b'"eval/' in line)
    return next((int(_clock_of(line)) for line in rows), -1)


def _clock_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["consumed_tokens"])
    except (ValueError, KeyError, TypeError):
        return math.inf
