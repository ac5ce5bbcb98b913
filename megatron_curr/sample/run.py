"""Prompts to clips: what `megatron-curr sample` does.

Legend: B prompts, C latent channels, T latent frames, Y rows, X columns, L text tokens, E width of
the text features.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_curr.curriculum.lots import VideoCurves, VideoPlanner
from megatron_curr.data.codecs import Frames
from megatron_curr.data.rectified_flow import MAX_TIMESTEP, draw_noise, shift_factor
from megatron_curr.data.tensor_file import Floats
from megatron_curr.data.text_features import pad_text
from megatron_curr.errors import DataError
from megatron_curr.models.patches import whole_video
from megatron_curr.recipe.video_schema import VideoRecipe, latent_shape
from megatron_curr.sample.encoders import OF_THE_RUN, Encoders, Speech, choose_encoders
from megatron_curr.sample.flow import Velocity, euler, guided, schedule
from megatron_curr.sample.model import TrainedModel, Weights, trained_model
from megatron_curr.sample.pictures import read_picture, write_contact_sheet, write_mp4
from megatron_curr.sample.wish import Wish

Tell = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was written."""

    folder: Path
    clips: tuple[Path, ...]
    sheet: Path
    checkpoint: Path
    weights: Weights
    frames: tuple[Frames, ...]
    elapsed_s: float


def sample(
    path: Path,
    output: Path,
    wish: Wish,
    *,
    weights: Weights = "auto",
    speech: Speech = OF_THE_RUN,
    tell: Tell = lambda done, total: None,
) -> Sampled:
    """Write a clip for each prompt, ``contact_sheet.png`` and ``sample.json`` to ``output``.

    ``path`` is whatever ``trained_model`` opens; ``speech`` says which codec and text encoder it
    speaks. The same wish on the same checkpoint gives the same clips, in whatever batches. Raises
    ``DataError`` and ``CheckpointError``.
    """
    began_s = time.monotonic()
    with trained_model(path, weights=weights) as trained:
        encoders = choose_encoders(speech, trained.recipe, trained.settings)
        studio = Studio(trained, encoders, wish)
        frames = studio.clips(tell)
    output.mkdir(parents=True, exist_ok=True)
    suffix = ".png" if len(frames[0]) == 1 else ".mp4"
    clips = tuple(output / f"{number:03d}{suffix}" for number in range(len(frames)))
    for clip, pictures in zip(clips, frames, strict=True):
        if suffix == ".png":
            write_contact_sheet(clip, [pictures], [""])
        else:
            write_mp4(clip, pictures, fps=studio.fps)
    sheet = output / "contact_sheet.png"
    write_contact_sheet(sheet, frames, wish.prompts)
    told = {
        **asdict(wish),
        "clips": [clip.name for clip in clips],
        "checkpoint": trained.checkpoint,
        "weights": trained.weights,
        "shift": studio.shift,
        "fps": studio.fps,
        "size": studio.size,
        "codec": encoders.codec.record.name,
        "text_encoder": encoders.text.record.name,
    }
    (output / "sample.json").write_text(json.dumps(told, indent=1, default=str) + "\n")
    return Sampled(
        folder=output,
        clips=clips,
        sheet=sheet,
        checkpoint=trained.checkpoint,
        weights=trained.weights,
        frames=tuple(frames),
        elapsed_s=time.monotonic() - began_s,
    )


class Studio:
    """A model with the codec and text encoder it was trained with."""

    def __init__(self, trained: TrainedModel, encoders: Encoders, wish: Wish) -> None:
        self._trained, self._wish = trained, wish
        self._codec, self._text = encoders.codec, encoders.text
        self.size = _choose_size(trained.recipe, wish)
        height, width, self._num_frames = self.size
        self._codec.check_frames(self._num_frames)
        self._latent_shape = latent_shape(
            (self._num_frames, height, width), self._codec.record.compression
        )
        if min(self._latent_shape) < 1:
            raise DataError(
                f"size {height}x{width}x{self._num_frames}: makes no latent of "
                f"{self._codec.record.compression}; take a larger one"
            )
        self.fps = wish.fps or encoders.fps
        self.shift = wish.shift or shift_factor(
            trained.objective,
            pixels=height * width,
            latent_frames=self._latent_shape[0],
            phase_shift=last_timestep_shift(trained.recipe) if trained.recipe else 1.0,
        )
        self._picture: Frames | None = None
        if wish.image is not None:
            self._picture = read_picture(wish.image, height=height, width=width)
        self._given_CTYX, self._noised_T = self._first_frame()

    def clips(self, tell: Tell) -> list[Frames]:
        """The frames of every prompt's clip."""
        wish, times = self._wish, schedule(self._wish.num_steps, shift=self.shift)
        batches = range(0, len(wish.prompts), wish.batch)
        frames: list[Frames] = []
        for turn, first in enumerate(batches):
            numbers = np.arange(first, min(first + wish.batch, len(wish.prompts)))
            latents_BCTYX = torch.empty(0)
            for step, latents_BCTYX in enumerate(self._flow(numbers, times), start=1):  # noqa: B007
                tell(turn * wish.num_steps + step, len(batches) * wish.num_steps)
            frames += [self._decoded(one) for one in latents_BCTYX.float().cpu().numpy()]
        return frames

    def _decoded(self, latents_CTYX: Floats) -> Frames:
        """Frames of one clip, where an image latent of its own comes first: without its help.

        MUG-V's release decodes what follows the image latent in windows of six counted from there,
        and puts the given picture in front. Where no picture is given, the image latent is decoded
        by itself.
        """
        chunk = self._codec.chunk_frames
        if chunk is None or chunk == 1 or self._num_frames % chunk != 1:
            return self._codec.decode(latents_CTYX)[-self._num_frames :]
        first = self._picture
        if first is None or self._num_frames == 1:
            first = self._codec.decode(latents_CTYX[:, :1])[-1:]
        if self._num_frames == 1:
            return first
        rest = self._codec.decode(latents_CTYX[:, 1:])
        height, width = rest.shape[1:3]  # a border that makes no latent does not come back
        return np.concatenate([first[:, :height, :width], rest])

    def _flow(self, numbers: np.ndarray, times: list[float]) -> Iterator[Tensor]:
        wish, trained = self._wish, self._trained
        shape = (trained.settings.in_channels, *self._latent_shape)
        # A prompt's noise depends on its number alone, so that batches change nothing.
        noise = draw_noise(wish.seed, numbers, shape, purpose="sample")
        prompts = [wish.prompts[number] + wish.prompt_suffix for number in numbers.tolist()]
        velocity = guided(
            self._velocity(prompts),
            self._velocity([wish.negative_prompt] * len(prompts)),
            guidance=wish.guidance,
        )
        device = trained.groups.device
        return euler(
            velocity,
            torch.from_numpy(noise).to(device),
            times,
            given_BCTYX=self._given_CTYX[None].to(device),
            noised_T=self._noised_T.to(device),
        )

    def _velocity(self, prompts: Sequence[str]) -> Velocity:
        """x0 - noise, as the model predicts it for these captions."""
        trained, limit = self._trained, self._trained.settings.max_text_tokens
        device, model = trained.groups.device, trained.model
        features = [self._text.encode(prompt)[:limit] for prompt in prompts]
        text, lengths = (torch.from_numpy(array).to(device) for array in pad_text(features))
        fps_B = torch.full((len(prompts),), 0.0 if self._num_frames == 1 else self.fps).to(device)
        noised_BT = self._noised_T.to(device).expand(len(prompts), -1)
        sign = 1 if trained.objective.velocity == "x0-noise" else -1

        def velocity(latents_BCTYX: Tensor, t: float) -> Tensor:
            timesteps_B = torch.full_like(fps_B, t * MAX_TIMESTEP)
            patches_BSK = model(latents_BCTYX, text, lengths, timesteps_B, fps_B, noised_BT)
            video = whole_video(
                patches_BSK,
                latent_shape=latents_BCTYX.shape,
                patch=trained.settings.patch,
                groups=trained.groups,
            )
            return sign * video[:, : latents_BCTYX.shape[1]]

        return velocity

    def _first_frame(self) -> tuple[Tensor, Tensor]:
        """Latents [C, T, Y, X] that are given, and which frames [T] are not."""
        num_latents = self._latent_shape[0]
        given_CTYX = torch.zeros(self._trained.settings.in_channels, *self._latent_shape)
        noised_T = torch.ones(num_latents, dtype=torch.bool)
        if self._picture is not None:
            if num_latents == 1:
                raise DataError(
                    f"{self._wish.image}: an image cannot go on from an image; choose a bucket of "
                    "clips, or a --size with more frames"
                )
            given_CTYX[:, :1] = torch.from_numpy(self._codec.encode(self._picture))
            noised_T[0] = False
        return given_CTYX, noised_T


def last_timestep_shift(recipe: VideoRecipe) -> float:
    """Where the curriculum's timestep_shift stands at its end."""
    planner = VideoPlanner(recipe)
    held: VideoCurves | None = None
    start = 0
    for phase in recipe.curriculum.phases:
        end = start + phase.tokens
        held = planner.curves(phase, held, start_tokens=start, end_tokens=end)
        start = end
    assert held is not None
    return float(held.timestep_shift.at(start))


def _choose_size(recipe: VideoRecipe | None, wish: Wish) -> tuple[int, int, int]:
    """Height, width and frames."""
    if wish.size is not None:
        return wish.size
    if recipe is None:
        raise DataError(
            "the model is no run, so it has no buckets; give --size HEIGHTxWIDTH[xFRAMES], or a "
            "--preset that has one"
        )
    known = recipe.data.buckets
    if wish.bucket is not None and wish.bucket not in known:
        raise DataError(f"no bucket {wish.bucket!r} in the recipe; choose of {', '.join(known)}")
    sizes = {name: (shape.height, shape.width, shape.num_frames) for name, shape in known.items()}
    return sizes[wish.bucket or max(sorted(sizes), key=lambda name: math.prod(sizes[name]))]
