"""From noise to latents along the learnt flow: Euler steps, guided away from a negative prompt.

Legend: B clips, C latent channels, T latent frames, Y rows, X columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_curr.data.rectified_flow import shifted

# (latents, t) -> x0 - noise, which latents move by as t falls from 1, noise, to 0, clean.
Velocity = Callable[[Tensor, float], Tensor]


def schedule(num_steps: int, *, shift: float) -> list[float]:
    """[num_steps + 1] times from 1 to 0, even ones pushed towards noise as in training."""
    times: list[float] = shifted(np.linspace(1, 0, num_steps + 1), shift).tolist()
    return times


def guided(with_prompt: Velocity, without: Velocity, *, guidance: float) -> Velocity:
    """Away from where the negative prompt leads; 1 is the prompt alone."""
    if guidance == 1:
        return with_prompt

    def velocity(latents_BCTYX: Tensor, t: float) -> Tensor:
        away = without(latents_BCTYX, t)
        return away + guidance * (with_prompt(latents_BCTYX, t) - away)

    return velocity


@torch.inference_mode()
def euler(
    velocity: Velocity,
    noise_BCTYX: Tensor,
    times: list[float],
    *,
    given_BCTYX: Tensor | None = None,
    noised_T: Tensor | None = None,
) -> Iterator[Tensor]:
    """The latents after each step. Frames that ``noised_T`` [T] says no of stay ``given_BCTYX``."""
    latents = noise_BCTYX

    def with_given(latents_BCTYX: Tensor) -> Tensor:
        if noised_T is None or given_BCTYX is None:
            return latents_BCTYX
        return torch.where(noised_T[:, None, None], latents_BCTYX, given_BCTYX)

    latents = with_given(latents)
    for t, next_t in pairwise(times):
        latents = with_given(latents + velocity(latents, t) * (t - next_t))
        yield latents
