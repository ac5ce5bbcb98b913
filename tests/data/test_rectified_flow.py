"""What is drawn for samples: its distribution, and what it depends on."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_curr.data.rectified_flow import (
    add_noise,
    draw_dropped,
    draw_frame_masks,
    draw_noise,
    draw_timesteps,
    shift_factor,
    shifted,
)
from megatron_curr.recipe.video_phases import TASKS
from megatron_curr.recipe.video_schema import Objective

IDS = np.arange(20_000, dtype=np.int64) * 2**20


def only(task: str) -> np.ndarray:
    return np.array([float(name == task) for name in TASKS])


@pytest.mark.parametrize(
    ("height", "width", "frames", "factor"),
    # Facts of MUG-V: images of 512 and 720 pixels, clips of 14 latents at 360p and 720p.
    [(512, 512, 1, 1.0), (720, 1280, 1, 1.88), (360, 640, 14, 3.51), (720, 1280, 14, 7.02)],
)
def test_shift_grows_with_resolution_and_latent_frames(height, width, frames, factor) -> None:
    shape = {"pixels": height * width, "latent_frames": frames}
    found = shift_factor(Objective(), **shape, phase_shift=1.0)
    assert found == pytest.approx(factor, abs=6e-3)
    assert shift_factor(Objective(shift="constant"), **shape, phase_shift=2.5) == 2.5


def test_timesteps_are_logit_normal_then_shifted() -> None:
    t = draw_timesteps(Objective(), 1, IDS, shift=1.0)
    logits = np.log(t / (1 - t))
    assert (logits.mean(), logits.std()) == pytest.approx((0, 1), abs=0.03)
    assert shifted(np.array([0.0, 0.5, 1.0]), 3.0).tolist() == [0.0, 0.75, 1.0]
    moved = draw_timesteps(Objective(), 1, IDS, shift=3.0)
    assert moved == pytest.approx(shifted(t, 3.0), abs=1e-9)


def test_a_share_of_timesteps_is_even() -> None:
    plain = draw_timesteps(Objective(), 1, IDS, shift=1.0)
    mixed = draw_timesteps(Objective(uniform_share=0.2), 1, IDS, shift=1.0)
    assert (plain != mixed).mean() == pytest.approx(0.2, abs=0.01)
    even = draw_timesteps(Objective(uniform_share=1.0), 1, IDS, shift=1.0)
    assert np.histogram(even, 4, (0, 1))[0] / len(even) == pytest.approx([0.25] * 4, abs=0.015)


def test_noise_is_normal_and_another_for_every_sample_and_seed() -> None:
    noise = draw_noise(1, IDS[:500], (2, 3, 4, 4))
    assert (noise.mean(), noise.std()) == pytest.approx((0, 1), abs=0.02)
    assert len(np.unique(noise[:, 0, 0, 0, 0])) == 500
    assert (draw_noise(1, IDS[7:8], (2, 3, 4, 4))[0] == noise[7]).all()  # whoever else is drawn
    assert (draw_noise(2, IDS[7:8], (2, 3, 4, 4))[0] != noise[7]).any()


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("t2v", {0}),
        ("i2v", {1}),
        *((task, {1, 2, 3}) for task in ("head", "tail", "random", "span")),
        ("head_tail", {2, 4, 6}),
    ],
)
def test_tasks_give_frames(task: str, given: set[int]) -> None:
    mask = draw_frame_masks(only(task), 1, IDS[:400], latent_frames=12)
    counts = (~mask).sum(axis=1)
    assert set(counts.tolist()) == given
    if task in ("i2v", "head"):
        assert all(not row[:count].any() for row, count in zip(mask, counts, strict=True))
    if task == "tail":
        assert all(not row[-count:].any() for row, count in zip(mask, counts, strict=True))
    if task in ("random", "span"):
        assert (~mask).any(axis=0).all()  # every place, some time
    if task == "span":  # in a row: one beginning, one end
        assert (np.diff(np.pad(~mask, ((0, 0), (1, 1))).astype(int)) != 0).sum(axis=1).max() == 2
    if task == "head_tail":
        assert (mask == mask[:, ::-1]).all() and not mask[:, [0, -1]].any()
        assert mask[:, 3:-3].all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("latent_frames", [1, 2, 3, 5])
def test_every_task_leaves_a_frame_to_be_learnt(task: str, latent_frames: int) -> None:
    assert draw_frame_masks(only(task), 1, IDS[:99], latent_frames=latent_frames).any(axis=1).all()


def test_tasks_of_no_weight_are_never_drawn_whatever_the_others_round_to() -> None:
    weights = np.array([0.0, 1 - 1e-3, 0, 0, 0, 0, 0])  # sums to less than 1
    mask = draw_frame_masks(weights, 1, IDS, latent_frames=12)
    assert (~mask[:, 0]).all() and mask[:, 1:].all()


def test_tasks_come_in_their_shares_and_images_always_get_noise() -> None:
    weights = np.array([0.5, 0.3, 0.0, 0.2, 0.0])
    mask = draw_frame_masks(weights, 1, IDS, latent_frames=4)
    shares = [mask.all(axis=1).mean(), (~mask[:, 0]).mean(), (~mask[:, -1]).mean()]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.015)
    assert draw_frame_masks(only("i2v"), 1, IDS[:9], latent_frames=1).all()
    assert draw_frame_masks(only("head"), 1, IDS[:9], latent_frames=2).any(axis=1).all()


def test_captions_are_dropped_in_their_share() -> None:
    assert draw_dropped(Objective(caption_dropout=0.3), 1, IDS).mean() == pytest.approx(
        0.3, abs=0.01
    )
    assert not draw_dropped(Objective(caption_dropout=0.0), 1, IDS).any()


@pytest.mark.parametrize(("velocity", "sign"), [("x0-noise", 1), ("noise-x0", -1)])
def test_velocity_leads_from_noise_to_the_sample(velocity: str, sign: int) -> None:
    draws = np.random.default_rng(0)
    clean, noise = (draws.standard_normal((2, 3, 4, 2, 2), np.float32) for _ in range(2))
    mask = np.array([[False, True, True, True], [True] * 4])
    t = np.array([0.25, 0.875])
    noised = add_noise(Objective(velocity=velocity), clean, noise, t_B=t, mask_BT=mask)
    assert (noised.latents_BCTYX[0, :, 0] == clean[0, :, 0]).all()
    back = noised.latents_BCTYX + sign * t.astype(np.float32).reshape(2, 1, 1, 1, 1) * (
        noised.target_BCTYX
    )
    assert back[1] == pytest.approx(clean[1], abs=1e-5)
    assert back[0, :, 1:] == pytest.approx(clean[0, :, 1:], abs=1e-5)
