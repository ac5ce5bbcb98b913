"""The curriculum of a video run: phases in latent patches, with shapes and tasks beside sources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_curr.recipe.phases import Curve, Mixture, RunPhase, with_weight_decay
from megatron_curr.recipe.section import Section

Task = Literal["t2v", "i2v", "head", "tail", "random", "span", "head_tail"]
TASKS: tuple[Task, ...] = ("t2v", "i2v", "head", "tail", "random", "span", "head_tail")
DEFAULT_TASKS = {"t2v": 1.0}
DEFAULT_TIMESTEP_SHIFT = 1.0


class VideoPhase(RunPhase):
    """An interval of a video curriculum; ``tokens`` are latent patches."""

    buckets: Mixture | None = Field(
        None, description="Weights of shapes, shared out among the buckets that a source has"
    )
    tasks: Mixture | None = Field(
        None,
        description="Weights of what a clip is given beside its caption: nothing (t2v), its first "
        "latent frame (i2v), or up to a quarter of its frames: from an end (head, tail), scattered "
        "(random), in a row anywhere (span), or as many at both ends (head_tail)",
    )
    timestep_shift: Curve | None = Field(
        None, description="Multiplies the shift that objective.shift names"
    )


def _with_defaults(phases: list[VideoPhase]) -> list[VideoPhase]:
    """The first phase with what a curve that is never given stands at."""
    first, *rest = with_weight_decay(phases)
    defaults = {"tasks": DEFAULT_TASKS, "timestep_shift": DEFAULT_TIMESTEP_SHIFT}
    missing = {name: value for name, value in defaults.items() if getattr(first, name) is None}
    return [first.model_copy(update=missing), *rest]


class VideoCurriculum(Section):
    """What a video run does from its first latent patch to its last."""

    phases: Annotated[list[VideoPhase], AfterValidator(_with_defaults)] = Field(
        min_length=1, description="One after the other"
    )
