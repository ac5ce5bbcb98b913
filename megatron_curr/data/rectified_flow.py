"""Rectified flow on latents: what a sample is made into before the model sees it. numpy only.

A sample is moved along the straight line from itself, at t = 0, to noise, at t = 1, and the model
learns the direction. Frames that a task gives the model stay as they are. Every draw is keyed by
(seed, purpose, sample id): the same on all ranks of a model, another for every sample and visit.

The line, the logit-normal t, its shift and the weight of images are MUG-V's (Shopee-MUG/MUG-V);
mixing in even t is Bridge's, a constant shift Wan's and FastVideo's.

Legend: B samples, C latent channels, T latent frames, Y rows, X columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_curr.curriculum.curves import Floats
from megatron_curr.data.keyed import Ints, stream_key, uniforms
from megatron_curr.recipe.video_phases import TASKS
from megatron_curr.recipe.video_schema import Objective

Latents = NDArray[np.float32]
Bools = NDArray[np.bool_]

MAX_TIMESTEP = 1000.0  # as the model counts them
REFERENCE_PIXELS = 512**2  # an image of so many is not shifted
# Digits kept of t: logarithm and cosine differ in the last bit between C libraries.
TIMESTEP_DIGITS = 12
_GIVEN_FRAC = 1 / 4  # of a clip's frames, the most that a task gives; head_tail at either end


def shift_factor(
    objective: Objective, *, pixels: int, latent_frames: int, phase_shift: float
) -> float:
    """How much more noise samples of a shape are trained at; 1 leaves t as drawn."""
    if objective.shift == "constant":
        return phase_shift
    return phase_shift * math.sqrt(pixels / REFERENCE_PIXELS) * math.sqrt(latent_frames)


def draw_timesteps(objective: Objective, seed: int, sample_ids: Ints, *, shift: float) -> Floats:
    """[B] in 0 to 1: logit-normal or even, then shifted towards noise."""
    radius, angle, choice, even = uniforms(seed, "timestep", sample_ids, 4).T
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box and Muller, 1958
    t = 1 / (1 + np.exp(-(objective.logit_mean + objective.logit_std * normal)))
    t = np.where(choice < objective.uniform_share, even, t)
    return shifted(t, shift)


def shifted(t: Floats, shift: float) -> Floats:
    """Timesteps in 0 to 1 pushed towards noise; 0 and 1 stay."""
    moved: Floats = np.round(shift * t / (1 + (shift - 1) * t), TIMESTEP_DIGITS)
    return moved


def draw_frame_masks(
    task_weights: Floats, seed: int, sample_ids: Ints, *, latent_frames: int
) -> Bools:
    """[B, T], True for frames that get noise; the others are given to the model as they are.

    ``task_weights`` [len(TASKS)] sum to 1. At least one frame gets noise, so an image always does.
    """
    mask = np.ones((len(sample_ids), latent_frames), np.bool_)
    if latent_frames == 1:
        return mask
    choice, length = uniforms(seed, "task", sample_ids, 2).T
    last = int(np.flatnonzero(task_weights)[-1])  # whatever the weights before it round to
    task = np.searchsorted(np.cumsum(task_weights)[:last], choice, side="right")
    most = max(int(latent_frames * _GIVEN_FRAC), 1)
    given = 1 + np.floor(length * most).astype(np.int64)
    given[task == TASKS.index("i2v")] = 1
    rank = _frame_ranks(task, given, seed, sample_ids, latent_frames=latent_frames)
    mask[task != TASKS.index("t2v")] = (rank >= given[:, None])[task != TASKS.index("t2v")]
    return mask


def _frame_ranks(
    task: Ints, given: Ints, seed: int, sample_ids: Ints, *, latent_frames: int
) -> Ints:
    """[B, T]: the frames in the order in which a sample's task gives them, ``given`` [B] of them.

    The kinds are those of MUG-V and Open-Sora; scattered frames are ours.
    """
    frames = np.arange(latent_frames)
    rank = np.tile(frames, (len(sample_ids), 1))
    rank[task == TASKS.index("tail")] = frames[::-1]
    scattered = uniforms(seed, "frames", sample_ids, latent_frames).argsort(axis=1).argsort(axis=1)
    is_random = task == TASKS.index("random")
    rank[is_random] = scattered[is_random]
    where = uniforms(seed, "span", sample_ids, 1)
    first = np.floor(where * (latent_frames - given[:, None] + 1)).astype(np.int64)
    is_span = task == TASKS.index("span")
    rank[is_span] = ((frames - first) % latent_frames)[is_span]
    if latent_frames > 2:  # of two frames one must get noise
        rank[task == TASKS.index("head_tail")] = np.minimum(frames, frames[::-1])
    return rank


def draw_dropped(objective: Objective, seed: int, sample_ids: Ints) -> Bools:
    """[B], True for samples whose caption is replaced by the empty one."""
    dropped: Bools = uniforms(seed, "caption", sample_ids, 1)[:, 0] < objective.caption_dropout
    return dropped


def draw_noise(
    seed: int, sample_ids: Ints, shape: tuple[int, ...], *, purpose: str = "noise"
) -> Latents:
    """[B, *shape] standard normal, one stream a sample.

    Philox of numpy: it is counter-based, so a stream costs nothing to begin (Salmon et al. 2011,
    "Parallel random numbers: as easy as 1, 2, 3").
    """
    noise = np.empty((len(sample_ids), *shape), np.float32)
    key = stream_key(seed, purpose)
    for row, sample_id in zip(noise, sample_ids.tolist(), strict=True):
        words = np.array([key, sample_id], np.uint64)
        np.random.Generator(np.random.Philox(key=words)).standard_normal(out=row, dtype=np.float32)
    return noise


@dataclass(frozen=True, slots=True)
class Noised:
    """Samples on their way, and where they are going."""

    latents_BCTYX: Latents
    target_BCTYX: Latents


def add_noise(
    objective: Objective, clean_BCTYX: Latents, noise_BCTYX: Latents, *, t_B: Floats, mask_BT: Bools
) -> Noised:
    """What the model sees and what it has to predict; the target of given frames is not used."""
    t = t_B.astype(np.float32)[:, None, None, None, None]
    moved = (1 - t) * clean_BCTYX + t * noise_BCTYX
    mask = mask_BT[:, None, :, None, None]
    away = clean_BCTYX - noise_BCTYX
    return Noised(
        latents_BCTYX=np.where(mask, moved, clean_BCTYX),
        target_BCTYX=away if objective.velocity == "x0-noise" else -away,
    )
