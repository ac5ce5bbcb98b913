from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_tools.make_video_demo import draw, scene
from megatron_curr.data.rectified_flow import add_noise
from megatron_curr.errors import DataError
from megatron_curr.recipe.video_schema import Objective
from megatron_curr.sample.flow import euler, guided, schedule
from megatron_curr.sample.pictures import read_picture, write_contact_sheet, write_mp4

SHAPE = (2, 3, 4, 2, 2)  # B, C, T, Y, X


@given(st.integers(1, 50), st.floats(0.1, 10))
def test_times_fall_from_noise_to_clean(num_steps: int, shift: float) -> None:
    times = schedule(num_steps, shift=shift)
    assert len(times) == num_steps + 1 and (times[0], times[-1]) == (1.0, 0.0)
    assert all(late < early for early, late in pairwise(times))


def test_a_larger_shift_spends_more_steps_in_noise() -> None:
    assert schedule(10, shift=3)[5] == pytest.approx(0.75)
    assert schedule(10, shift=1)[5] == pytest.approx(0.5)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_the_exact_velocity_leads_from_noise_to_the_sample(num_steps: int) -> None:
    """Training's own target, as the model would give it if it had learnt it."""
    draws = np.random.default_rng(0)
    clean, noise = (draws.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    target = add_noise(
        Objective(), clean, noise, t_B=np.array([0.3, 0.9]), mask_BT=np.ones((2, 4), np.bool_)
    ).target_BCTYX
    *_, reached = euler(
        lambda latents, t: torch.from_numpy(target),
        torch.from_numpy(noise),
        schedule(num_steps, shift=2),
    )
    np.testing.assert_allclose(reached.numpy(), clean, atol=1e-5)


def test_given_frames_stay_as_they_are_at_every_step() -> None:
    noise, given_frames = torch.randn(SHAPE), torch.randn(SHAPE)
    noised_T = torch.tensor([False, True, True, False])
    seen: list[torch.Tensor] = []

    def velocity(latents: torch.Tensor, t: float) -> torch.Tensor:
        seen.append(latents)
        return torch.ones_like(latents)

    times = schedule(4, shift=1)
    *_, reached = euler(velocity, noise, times, given_BCTYX=given_frames, noised_T=noised_T)
    for latents in [*seen, reached]:
        torch.testing.assert_close(latents[:, :, ~noised_T], given_frames[:, :, ~noised_T])
    torch.testing.assert_close(reached[:, :, noised_T], noise[:, :, noised_T] + 1)


def test_guidance_leads_away_from_the_negative_prompt() -> None:
    latents = torch.zeros(SHAPE)
    velocity = guided(lambda x, t: x + 2, lambda x, t: x + 1, guidance=4)
    assert (velocity(latents, 0.5) == 5).all()

    def not_called(latents: torch.Tensor, t: float) -> torch.Tensor:
        raise AssertionError("guidance 1 needs no second pass")

    assert (guided(lambda x, t: x + 2, not_called, guidance=1)(latents, 0.5) == 2).all()


def test_clips_become_films_and_a_contact_sheet(tmp_path: Path) -> None:
    clips = [draw(scene(number)) for number in (0, 8)]
    write_mp4(tmp_path / "clip.mp4", clips[0], fps=16)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.average_rate) == ("h264", 16)
        assert stream.codec_context.pix_fmt == "yuv420p"
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert np.abs(np.stack(decoded).astype(int) - clips[0]).mean() < 3
    write_contact_sheet(tmp_path / "sheet.png", clips, ["one", "two"])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 8 * 128 and sheet.height > 2 * 128
        # The first picture of the first row is the first frame, twice as large.
        pixels = np.asarray(sheet)[4 + 16 : 4 + 16 + 128, 4 : 4 + 128]
    np.testing.assert_array_equal(pixels[::2, ::2], clips[0][0])


def test_a_picture_to_go_on_from_is_cut_to_the_bucket(tmp_path: Path) -> None:
    Image.fromarray(draw(scene(3), size=80)[0, :60]).save(tmp_path / "picture.png")
    assert read_picture(tmp_path / "picture.png", height=32, width=64).shape == (1, 32, 64, 3)
    (tmp_path / "not.png").write_bytes(b"not")
    with pytest.raises(DataError, match=r"not\.png: cannot be read as a picture"):
        read_picture(tmp_path / "not.png", height=32, width=32)
