"""Prompts to clips: what `megatron-curr sample` does.

Legend: B prompts, C latent channels, T latent frames, Y rows, X columns, L text tokens, E width of
the text features.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_curr.curriculum.lots import VideoCurves, VideoPlanner
from megatron_curr.data.codecs import Codec, Frames, load_codec
from megatron_curr.data.rectified_flow import MAX_TIMESTEP, draw_noise, shift_factor
from megatron_curr.data.text_features import TextEncoder, load_text_encoder, pad_text
from megatron_curr.data.video_manifest import VideoManifest, read_video_manifest
from megatron_curr.errors import DataError
from megatron_curr.models.patches import whole_video
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.sample.flow import Velocity, euler, guided, schedule
from megatron_curr.sample.model import TrainedModel, Weights, trained_model
from megatron_curr.sample.pictures import read_picture, write_contact_sheet, write_mp4

Tell = Callable[[int, int], None]  # steps done, of how many


@dataclass(frozen=True, slots=True)
class Wish:
    """What to sample; recorded beside the clips."""

    prompts: tuple[str, ...]
    negative_prompt: str = ""
    image: Path | None = None
    bucket: str | None = None  # None: the largest
    num_steps: int = 25
    guidance: float = 4.0
    shift: float | None = None  # None: as trained
    fps: float | None = None  # None: the shards' rate
    seed: int = 0
    batch: int = 8

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("no prompt: give --prompt")
        if self.num_steps < 1 or self.batch < 1:
            raise DataError(f"steps {self.num_steps}, batch {self.batch}: must be 1 or more")


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
    shards: Path | None = None,
    tell: Tell = lambda done, total: None,
) -> Sampled:
    """Write a clip for each prompt, ``contact_sheet.png`` and ``sample.json`` to ``output``.

    ``shards``, by default the run's own, say which codec and text encoder the model speaks. The
    same wish on the same checkpoint gives the same clips, in whatever batches. Raises ``DataError``
    and ``CheckpointError``.
    """
    began_s = time.monotonic()
    with trained_model(path, weights=weights) as trained:
        studio = Studio(trained, manifest_of(trained.recipe, shards), wish)
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
        "bucket": studio.bucket,
        "codec": studio.codec.record.name,
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

    def __init__(self, trained: TrainedModel, manifest: VideoManifest, wish: Wish) -> None:
        self._trained, self._wish = trained, wish
        recipe = trained.recipe
        self.codec, self.encoder = open_encoders(manifest)
        self.bucket = _choose_bucket(recipe, wish)
        shape = recipe.data.buckets[self.bucket]
        self._latent_shape = recipe.data.latent_shape(self.bucket)
        self._num_frames = shape.num_frames
        self.fps = wish.fps or float(manifest.options.get("fps", 24.0))
        self.shift = wish.shift or shift_factor(
            recipe.objective,
            pixels=shape.height * shape.width,
            latent_frames=self._latent_shape[0],
            phase_shift=last_timestep_shift(recipe),
        )
        self._given_CTYX, self._noised_T = self._first_frame(shape.height, shape.width)

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
            # What an image latent stands for comes first: a codec gives it back several times.
            frames += [
                self.codec.decode(latents)[-self._num_frames :]
                for latents in latents_BCTYX.float().cpu().numpy()
            ]
        return frames

    def _flow(self, numbers: np.ndarray, times: list[float]) -> Iterator[Tensor]:
        wish, trained = self._wish, self._trained
        shape = (trained.recipe.model.in_channels, *self._latent_shape)
        # A prompt's noise depends on its number alone, so that batches change nothing.
        noise = draw_noise(wish.seed, numbers, shape, purpose="sample")
        prompts = [wish.prompts[number] for number in numbers.tolist()]
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
        trained, limit = self._trained, self._trained.recipe.model.max_text_tokens
        device, model = trained.groups.device, trained.model
        features = [self.encoder.encode(prompt)[:limit] for prompt in prompts]
        text, lengths = (torch.from_numpy(array).to(device) for array in pad_text(features))
        fps_B = torch.full((len(prompts),), 0.0 if self._num_frames == 1 else self.fps).to(device)
        noised_BT = self._noised_T.to(device).expand(len(prompts), -1)
        sign = 1 if trained.recipe.objective.velocity == "x0-noise" else -1

        def velocity(latents_BCTYX: Tensor, t: float) -> Tensor:
            timesteps_B = torch.full_like(fps_B, t * MAX_TIMESTEP)
            patches_BSK = model(latents_BCTYX, text, lengths, timesteps_B, fps_B, noised_BT)
            video = whole_video(
                patches_BSK,
                latent_shape=latents_BCTYX.shape,
                patch=trained.recipe.model.patch,
                groups=trained.groups,
            )
            return sign * video[:, : latents_BCTYX.shape[1]]

        return velocity

    def _first_frame(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Latents [C, T, Y, X] that are given, and which frames [T] are not."""
        num_latents = self._latent_shape[0]
        channels = self._trained.recipe.model.in_channels
        given_CTYX = torch.zeros(channels, *self._latent_shape)
        noised_T = torch.ones(num_latents, dtype=torch.bool)
        if self._wish.image is not None:
            if num_latents == 1:
                raise DataError(
                    f"bucket {self.bucket!r}: is of images, which cannot go on from an image; "
                    "choose a bucket of clips"
                )
            picture = read_picture(self._wish.image, height=height, width=width)
            given_CTYX[:, :1] = torch.from_numpy(self.codec.encode(picture))
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


def manifest_of(recipe: VideoRecipe, shards: Path | None) -> VideoManifest:
    """What made the shards: the run's, or others like them. Raises ``DataError``."""
    if shards is not None:
        return read_video_manifest(shards)
    folder = Path(next(iter(recipe.data.sources.values())).shards)
    if not folder.is_dir():
        raise DataError(
            f"{folder}: the run's shards are not there, and they say which codec and text encoder "
            "the model speaks; run from the folder the run was started in, or give shards of the "
            "same codec and encoder with --shards"
        )
    return read_video_manifest(folder)


def open_encoders(manifest: VideoManifest) -> tuple[Codec, TextEncoder]:
    """Those that made the shards. Raises ``DataError`` where they have changed since."""
    codec = load_codec(manifest.codec.name)
    encoder = load_text_encoder(manifest.text_encoder.name)
    for record, wanted in (
        (codec.record, manifest.codec),
        (encoder.record, manifest.text_encoder),
    ):
        if record.sha256 != wanted.sha256:
            raise DataError(
                f"{wanted.name}: is not what the shards were made with (sha256 "
                f"{record.sha256[:12]}, then {wanted.sha256[:12]}); put the old weights back"
            )
    return codec, encoder


def _choose_bucket(recipe: VideoRecipe, wish: Wish) -> str:
    known = recipe.data.buckets
    if wish.bucket is None:
        return max(known, key=lambda name: known[name].height * known[name].num_frames)
    if wish.bucket not in known:
        raise DataError(f"no bucket {wish.bucket!r} in the recipe; choose of {', '.join(known)}")
    return wish.bucket
