"""The recipe: every setting of a run, typed, frozen and checked where it is born.

What a video run has of its own is in ``video_schema.py``.

Field names are Megatron's where Megatron has one. Sizes may be written ``400k``, ``1.5T``.
Cross-section rules live in ``check.py``; reading YAML and naming lines in ``load.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.phases import Curriculum
from megatron_curr.recipe.section import NAME_PATTERN, PositiveTokens, Section
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_phases import VideoCurriculum

OnExhausted = Literal["error", "stop", "reweight"]
"""What happens where a source has been read ``max_epochs`` times."""


class Source(Section):
    """One named part of the mixture: one or more indexed shards."""

    shards: str = Field(description="Folder, glob or prefix of .bin/.idx shards")
    heldout: str | None = Field(None, description="Shards evaluated on, never trained on")
    max_epochs: float = Field(4.0, gt=0, description="Most passes over the source in the whole run")
    on_exhausted: OnExhausted = "error"


class Data(Section):
    tokenizer: str = Field(description="SentencePiece .model or a Hugging Face tokenizer folder")
    sources: dict[Annotated[str, Field(pattern=NAME_PATTERN)], Source] = Field(min_length=1)
    isolate_documents: bool = Field(
        False, description="Attention does not cross document boundaries inside a window"
    )
    chunk_tokens: PositiveTokens | None = Field(
        None,
        description="Unit in which a source is shuffled; a multiple of every seq_length. Default: "
        "the longest one. Set it higher to leave room for a longer phase that an amendment adds",
    )


class Optimizer(Section):
    """Adam with decoupled weight decay; the rate and the decay come from the curriculum."""

    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip_grad: float = Field(1.0, gt=0, description="Largest global gradient norm")


class Training(Section):
    precision: Literal["fp32", "bf16"] = "bf16"
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="Keep a moving average of the weights: 0.9999 a step"
    )
    max_nonfinite_steps: int = Field(
        3, gt=0, description="Stop after this many refused updates in a row"
    )
    hang_step_multiple: float = Field(
        20.0, gt=1, description="A step of this many times the recent median is a hang"
    )
    hang_least_s: float = Field(
        300.0, gt=0, description="No step is a hang sooner; ten times this for all else"
    )


class Checkpoint(Section):
    every_tokens: PositiveTokens
    keep_last: int = Field(2, gt=0)
    keep_every_tokens: PositiveTokens | None = Field(None, description="Keep one of these for ever")


class Evaluation(Section):
    every_tokens: PositiveTokens
    tokens_per_source: PositiveTokens = Field(
        65_536, description="Held-out tokens read per source; latent patches for video"
    )


class Logging(Section):
    tensorboard: bool = False
    wandb_project: str | None = None
    peak_flops_per_device: float | None = Field(
        None, gt=0, description="In FLOP/s; gives model-FLOPs utilisation when set"
    )


class RunRecipe(Section):
    """What every run has, whatever it trains. The sections of a kind of run narrow these."""

    name: str = Field(pattern=NAME_PATTERN)
    seed: int = Field(1234, ge=0, lt=2**63)
    run_folder: Path | None = Field(None, strict=False, description="Default: runs/<name>")
    model: Model | VideoDiT
    data: Section
    curriculum: Curriculum | VideoCurriculum
    optimizer: Optimizer = Optimizer()
    parallel: Parallel
    training: Training = Training()
    checkpoint: Checkpoint
    evaluation: Evaluation
    logging: Logging = Logging()

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.run_folder or Path("runs") / self.name


class Recipe(RunRecipe):
    """The whole run of a language model."""

    init_from: str | None = Field(
        None,
        pattern=r"^(hf|checkpoint|ema):.+",
        description="First weights: hf:FOLDER of a published model, checkpoint:FOLDER of a run or "
        "of a converted or merged model, ema:FOLDER for a run's moving average; moments begin at "
        "zero. Default: drawn from the seed",
    )
    init_new_tokens: Literal["mean", "random"] | None = Field(
        None,
        description="What tokens begin as that init_from does not have: the mean of its rows, or "
        "rows drawn from the seed. Default: there must be none",
    )
    model: Model
    data: Data
    curriculum: Curriculum
