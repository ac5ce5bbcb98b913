"""What a plan says: memory, time, messages, epochs, checkpoints, and whether it all fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_curr.plan.activations import MicroBatch
from megatron_curr.plan.alternatives import Alternative
from megatron_curr.plan.cluster import Cluster
from megatron_curr.plan.layout import Axes, Stage
from megatron_curr.plan.memory import StageMemory
from megatron_curr.plan.page import page
from megatron_curr.plan.phases import PhaseSteps
from megatron_curr.plan.shapes import AnyRecipe
from megatron_curr.plan.step_time import StepTime
from megatron_curr.plan.traffic import Message


@dataclass(frozen=True, slots=True)
class PhasePlan:
    """What a phase costs."""

    steps: PhaseSteps
    num_micro_batches: float  # of a data-parallel rank in a step, on average, of all shapes
    flops_per_token: float
    step: StepTime
    step_s: float  # expected: of the model of time, or of the utilisation that was stated

    @property
    def hours(self) -> float:
        """Of the whole phase, without evaluations and checkpoints."""
        return self.steps.steps * self.step_s / 3600

    @property
    def tokens_per_s(self) -> float:
        """Of all ranks."""
        return self.steps.mean_batch_tokens / self.step_s


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """What the run writes."""

    bytes_each: int
    num_written: int
    num_kept: int  # at the end of the run
    most_at_once: int  # while one is being written

    @property
    def most_bytes(self) -> int:
        """Room that the run folder needs for checkpoints."""
        return self.bytes_each * self.most_at_once


@dataclass(frozen=True)
class Plan:
    """Everything worked out; ``problems`` is empty where the run may be submitted."""

    recipe: AnyRecipe
    cluster: Cluster
    batch: MicroBatch  # the longest
    keys_per_token: float  # of the last phase
    axes: Axes
    stages: tuple[Stage, ...]
    memory: tuple[StageMemory, ...]  # of each stage
    parameters: int
    active_parameters: int
    phases: tuple[PhasePlan, ...]
    messages: tuple[Message, ...]  # of the stage that sends most
    checkpoints: CheckpointPlan
    epochs: dict[str, list[float]]
    stated_mfu: float | None
    problems: tuple[str, ...]
    warnings: tuple[str, ...]
    remarks: tuple[str, ...]
    alternatives: tuple[Alternative, ...] = ()
    refusal: str | None = None  # why training would not start, as far as this machine can tell

    @property
    def fits(self) -> bool:
        """Nothing stands against it."""
        return not self.problems

    @property
    def fullest_stage(self) -> int:
        """The stage whose ranks hold most."""
        totals = [memory.total for memory in self.memory]
        return totals.index(max(totals))

    @property
    def peak_bytes(self) -> float:
        """The most that any rank holds at one time."""
        return max(memory.total for memory in self.memory)

    @property
    def hours(self) -> float:
        """Of training; evaluations and checkpoints come on top."""
        return sum(phase.hours for phase in self.phases)

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak of all GPUs, over the whole run."""
        flops = sum(phase.flops_per_token * phase.steps.tokens for phase in self.phases)
        return flops / (self.hours * 3600 * self.cluster.world_size * self.cluster.gpu.peak_flops)

    def text(self, width: int = 100) -> str:
        """For people."""
        return page(self, width=width)

    def json(self) -> dict[str, Any]:
        """For scripts: plain values, sizes in bytes, times in seconds unless named otherwise."""
        return {
            "name": self.recipe.name,
            "fits": self.fits,
            "problems": list(self.problems),
            "refusal": self.refusal,
            "warnings": list(self.warnings),
            "remarks": list(self.remarks),
            "cluster": asdict(self.cluster),
            "parameters": self.parameters,
            "active_parameters": self.active_parameters,
            "peak_bytes": self.peak_bytes,
            "stages": [
                {
                    "stage": stage.index,
                    "layers": len(stage.layers),
                    **asdict(memory),
                    "total": memory.total,
                }
                for stage, memory in zip(self.stages, self.memory, strict=True)
            ],
            "messages": [
                {
                    "axis": message.axis.name,
                    "ranks": message.axis.size,
                    "link": message.axis.link(self.cluster),
                    "what": message.what,
                    "bytes_per_step": message.step_bytes(round(self.phases[-1].num_micro_batches)),
                }
                for message in self.messages
            ],
            "mfu": self.mfu,
            "hours": self.hours,
            "phases": [
                {
                    **asdict(phase.steps),
                    "flops_per_token": phase.flops_per_token,
                    "step_s": phase.step_s,
                    "bubble_frac": phase.step.bubble_frac,
                    "tokens_per_s": phase.tokens_per_s,
                    "hours": phase.hours,
                }
                for phase in self.phases
            ],
            "epochs": self.epochs,
            "checkpoints": {**asdict(self.checkpoints), "most_bytes": self.checkpoints.most_bytes},
            "alternatives": [asdict(found) for found in self.alternatives],
        }
