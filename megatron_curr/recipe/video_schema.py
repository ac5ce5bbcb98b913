"""The recipe of a video run: shapes, sources of latents, and the flow objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from megatron_curr.recipe.schema import ON_EXHAUSTED, OnExhausted, RunRecipe
from megatron_curr.recipe.section import NAME_PATTERN, Section, by_name
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_phases import VideoCurriculum

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


def latent_shape(pixels: Sequence[int], compression: Sequence[int]) -> tuple[int, int, int]:
    """Latent frames, rows, columns of frames, rows, columns of pixels.

    A part of a latent counts whole in time, since the first frame is repeated to fill it, and not
    at all in space, where convolutions of stride two leave the border out.
    """
    frames, height, width = pixels
    per_frame, per_row, per_column = compression
    return -(-frames // per_frame), height // per_row, width // per_column


class Bucket(Section):
    """One shape of samples, in pixels, and how many of them make a lot."""

    height: int = Field(gt=0, description="Pixels")
    width: int = Field(gt=0, description="Pixels")
    num_frames: int = Field(gt=0, description="1 for images")
    batch_samples: int = Field(
        gt=0, description="Samples of a lot, which all data-parallel ranks work on together"
    )


class VideoSource(Section):
    """One named part of the mixture: a folder of video shards."""

    shards: str = Field(description="Folder that preprocess-video wrote")
    heldout: str | None = Field(None, description="Shards evaluated on, never trained on")
    buckets: list[Name] = Field(min_length=1, description="Shapes that are read of this source")
    max_epochs: float = Field(4.0, gt=0, description="Most passes over any shape of the source")
    on_exhausted: OnExhausted = Field("error", description=ON_EXHAUSTED)


class VideoData(Section):
    """What a video run reads, and in which shapes."""

    compression: list[Annotated[int, Field(gt=0)]] = Field(
        [8, 8, 8],
        min_length=3,
        max_length=3,
        description="Frames, rows and columns of pixels that the codec makes one latent of",
    )
    buckets: Annotated[dict[Name, Bucket], AfterValidator(by_name)] = Field(
        min_length=1, description="The shapes, by name"
    )
    sources: Annotated[dict[Name, VideoSource], AfterValidator(by_name)] = Field(
        min_length=1, description="The named parts that mixtures give weights to"
    )

    def latent_shape(self, bucket: str) -> tuple[int, int, int]:
        """Latent frames, rows, columns of a bucket's samples."""
        shape = self.buckets[bucket]
        pixels = (shape.num_frames, shape.height, shape.width)
        return latent_shape(pixels, self.compression)


class Objective(Section):
    """Rectified flow: the defaults are MUG-V's, the others what neighbours use."""

    velocity: Literal["x0-noise", "noise-x0"] = Field(
        "x0-noise", description="What the model predicts; Wan and Open-Sora 2 use noise-x0"
    )
    logit_mean: float = Field(0.0, description="Mean of the timesteps' logits")
    logit_std: float = Field(1.0, gt=0, description="Their standard deviation")
    uniform_share: float = Field(
        0.0, ge=0, le=1, description="Share of timesteps drawn evenly, not logit-normally"
    )
    shift: Literal["resolution", "constant"] = Field(
        "resolution",
        description="Timesteps grow with sqrt(height x width / 512^2 x latent frames), or not; "
        "times the phase's timestep_shift",
    )
    image_loss_weight: float = Field(0.3, ge=0, description="Weight of pictures beside clips")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="Share of captions replaced by the shards' empty caption"
    )


class VideoRecipe(RunRecipe):
    """The whole run of a video diffusion transformer."""

    init_from: str | None = Field(
        None,
        pattern=r"^(hf|checkpoint|ema):.+",
        description="First weights: hf:PLACE of a published model (dit.pt, or a folder), "
        "checkpoint:FOLDER of a run, of a converted model or of MUG-V's training code, ema:FOLDER "
        "for a run's moving average; moments begin at zero. Default: drawn from the seed",
    )
    model: VideoDiT = Field(description="What is trained: a preset, or an architecture")
    data: VideoData = Field(description="Shapes and sources")
    curriculum: VideoCurriculum = Field(description="What happens at which latent patch")
    objective: Objective = Field(Objective(), description="What the model learns to predict")

    def sample_tokens(self, bucket: str) -> int:
        """Latent patches of one sample of a bucket."""
        return self.model.num_patches(self.data.latent_shape(bucket))

    def lot_tokens(self, bucket: str) -> int:
        """Latent patches of one lot of a bucket."""
        return self.sample_tokens(bucket) * self.data.buckets[bucket].batch_samples
