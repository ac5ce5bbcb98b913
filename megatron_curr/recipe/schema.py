"""The recipe: every setting of a run, typed, frozen and checked where it is born.

What a video run has of its own is in ``video_schema.py``.

Field names are Megatron's where Megatron has one. Sizes may be written ``400k``, ``1.5T``.
Cross-section rules live in ``check.py``; reading YAML and naming lines in ``load.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.phases import Curriculum
from megatron_curr.recipe.section import NAME_PATTERN, PositiveTokens, Section, by_name
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_phases import VideoCurriculum
from megatron_curr.units import parse_count

OnExhausted = Literal["error", "stop", "reweight"]
ON_EXHAUSTED = (
    "Where the source would be read more than max_epochs times: refuse to start (error), end the "
    "run there (stop), or share its weight out among the others (reweight)"
)

CADENCE_PARTS = 20
LONGEST_CADENCE_TOKENS = 5 * 10**9
_CADENCE = "Default: a twentieth of the run, at most 5B"


def _has_default(*names: str) -> Callable[[dict[str, Any]], None]:
    """For the JSON schema: fields that ``RunRecipe`` fills in are not required."""

    def describe(schema: dict[str, Any]) -> None:
        schema["required"] = [name for name in schema["required"] if name not in names]

    return describe


class Source(Section):
    """One named part of the mixture: one or more indexed shards."""

    shards: str = Field(description="Folder, glob or prefix of .bin/.idx shards")
    heldout: str | None = Field(None, description="Shards evaluated on, never trained on")
    max_epochs: float = Field(4.0, gt=0, description="Most passes over the source in the whole run")
    on_exhausted: OnExhausted = Field("error", description=ON_EXHAUSTED)


class Data(Section):
    """What a text run reads."""

    tokenizer: str = Field(description="SentencePiece .model or a Hugging Face tokenizer folder")
    sources: Annotated[
        dict[Annotated[str, Field(pattern=NAME_PATTERN)], Source], AfterValidator(by_name)
    ] = Field(min_length=1, description="The named parts that mixtures give weights to")
    isolate_documents: bool = Field(
        False, description="Attention does not cross document boundaries inside a window"
    )
    chunk_tokens: PositiveTokens | None = Field(
        None,
        description="Unit in which a source is shuffled; a multiple of every seq_length. Default: "
        "the longest one, fixed when the run starts. Set it higher to leave room for a longer "
        "seq_length that an amendment adds",
    )


class Optimizer(Section):
    """Adam with decoupled weight decay; the rate and the decay come from the curriculum."""

    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the first moment, a step")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="Decay of the second moment, a step")
    adam_eps: float = Field(1e-8, gt=0, description="Added to the root of the second moment")
    clip_grad: float = Field(1.0, gt=0, description="Largest global gradient norm")


class Training(Section):
    """How steps are computed, and what ends a run that goes wrong."""

    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="Of the forward and backward pass; weights are kept in fp32 beside it"
    )
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
    """When checkpoints are saved, and which of them stay."""

    model_config = ConfigDict(json_schema_extra=_has_default("every_tokens"))

    every_tokens: PositiveTokens = Field(
        description=f"Save when a step crosses a multiple of this. {_CADENCE}"
    )
    keep_last: int = Field(2, gt=0, description="Newest checkpoints that stay")
    keep_every_tokens: PositiveTokens | None = Field(None, description="Keep one of these for ever")
    max_failed_saves: int = Field(
        3, gt=0, description="Stop after this many saves in a row that did not reach the disk"
    )


class Evaluation(Section):
    """When the held-out shards of the sources are evaluated, and how much of them."""

    model_config = ConfigDict(json_schema_extra=_has_default("every_tokens"))

    every_tokens: PositiveTokens = Field(
        description=f"Evaluate when a step crosses a multiple of this. {_CADENCE}"
    )
    tokens_per_source: PositiveTokens = Field(
        65_536, description="Held-out tokens read per source; latent patches for video"
    )


class Logging(Section):
    """Where metrics go beside ``metrics.jsonl``."""

    tensorboard: bool = Field(False, description="Also to TensorBoard, in logs/tensorboard")
    wandb_project: str | None = Field(
        None, description="Also to this project of Weights & Biases; default: not there"
    )
    peak_flops_per_device: float | None = Field(
        None, gt=0, description="In FLOP/s; gives model-FLOPs utilisation when set"
    )


class RunRecipe(Section):
    """What every run has, whatever it trains. The sections of a kind of run narrow these."""

    model_config = ConfigDict(json_schema_extra=_has_default("checkpoint", "evaluation"))

    name: str = Field(pattern=NAME_PATTERN, description="Of the run")
    seed: int = Field(1234, ge=0, lt=2**63, description="Of first weights and of the sample order")
    run_folder: Path | None = Field(
        None,
        strict=False,
        description="Where the run writes everything that it writes; default: runs/<name>",
    )
    model: Model | VideoDiT = Field(description="What is trained")
    data: Section = Field(description="What it is trained on")
    curriculum: Curriculum | VideoCurriculum = Field(description="What happens at which token")
    optimizer: Optimizer = Field(Optimizer(), description="Adam's settings")
    parallel: Parallel = Field(description="How the model is split over ranks")
    training: Training = Field(Training(), description="How steps are computed")
    checkpoint: Checkpoint = Field(description="When the run is saved")
    evaluation: Evaluation = Field(description="When held-out losses are measured")
    logging: Logging = Field(Logging(), description="Where metrics go beside metrics.jsonl")

    @model_validator(mode="before")
    @classmethod
    def _fill_cadences(cls, values: Any) -> Any:
        """Where it is not said how often to save and to evaluate: by the length of the run."""
        if not isinstance(values, dict):
            return values
        longest = LONGEST_CADENCE_TOKENS
        cadence = {"every_tokens": min(-(-_total_tokens(values) // CADENCE_PARTS), longest)}
        filled = dict(values)
        for section in ("checkpoint", "evaluation"):
            given = values.get(section, {})
            if isinstance(given, dict):
                filled[section] = {**cadence, **given}
        return filled

    @property
    def folder(self) -> Path:
        """Where the run lives."""
        return self.run_folder or Path("runs") / self.name


def _total_tokens(values: dict[str, Any]) -> int:
    """The length of the curriculum as it is written; 1 where that is wrong, which will be told."""
    try:
        total = sum(parse_count(phase["tokens"]) for phase in values["curriculum"]["phases"])
    except (KeyError, TypeError, ValueError):
        return 1
    return max(total, 1)


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
    model: Model = Field(description="What is trained: a preset, or an architecture")
    data: Data = Field(description="Tokenizer and sources")
    curriculum: Curriculum = Field(description="What happens at which token")
