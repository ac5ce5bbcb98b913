"""What is trained: the architecture of a video diffusion transformer."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from megatron_curr.recipe.presets import VIDEO_PRESETS, architecture_or_preset, model_preset
from megatron_curr.recipe.section import Section

ROTARY_AXES = 3  # row, column and frame share a head's channels; each takes pairs of them


class VideoDiT(Section):
    """MUG-V's diffusion transformer, in the terms of megatron-core where it has one."""

    model_config = ConfigDict(
        json_schema_extra=architecture_or_preset(
            VIDEO_PRESETS, has_default={"kv_channels", "ffn_hidden_size"}
        )
    )

    preset: str | None = Field(
        None, description="Named architecture; fields given here override it"
    )
    num_layers: int = Field(gt=0, description="Transformer layers")
    hidden_size: int = Field(gt=0, description="Width of the residual stream")
    ffn_hidden_size: int = Field(gt=0, description="Width of the MLP; default: 4 x hidden_size")
    num_attention_heads: int = Field(gt=0, description="Heads of queries, keys and values")
    kv_channels: int = Field(
        gt=0, description="Head dimension, a multiple of 6; default: hidden_size / heads"
    )
    in_channels: int = Field(24, gt=0, description="Channels of a latent frame")
    out_channels: int = Field(
        48, gt=0, description="Channels predicted; only the first in_channels of them are used"
    )
    patch: list[Annotated[int, Field(gt=0)]] = Field(
        [1, 2, 2],
        min_length=3,
        max_length=3,
        description="Frames, rows and columns of latents that make one token",
    )
    text_hidden_size: int = Field(4096, gt=0, description="Width of the text encoder's features")
    max_text_tokens: int = Field(300, gt=0, description="Caption tokens that are attended to")
    timestep_frequencies: int = Field(
        256, gt=0, multiple_of=2, description="Width of the sinusoids of timestep and frame rate"
    )
    round_timesteps: bool = Field(
        False,
        description="Round timesteps and frame rates to the weights' dtype before their sinusoids, "
        "as MUG-V's release does; without effect in fp32",
    )
    rotary_base: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies")
    layernorm_epsilon: float = Field(1e-6, gt=0, description="Added to a norm's variance")
    init_method_std: float = Field(0.02, gt=0, description="Standard deviation of first weights")

    @property
    def num_query_groups(self) -> int:
        """Key/value heads: as many as query heads."""
        return self.num_attention_heads

    @property
    def num_moe_experts(self) -> None:
        """Every layer is dense."""

    @property
    def patch_volume(self) -> int:
        """Latent positions of one token."""
        return math.prod(self.patch)

    def num_patches(self, latent_shape: tuple[int, int, int]) -> int:
        """Tokens of a sample of ``latent_shape`` frames, rows, columns; borders are filled up."""
        return math.prod(
            -(-length // size) for length, size in zip(latent_shape, self.patch, strict=True)
        )

    @field_validator("kv_channels")
    @classmethod
    def _rotates_three_axes(cls, channels: int) -> int:
        if channels % (2 * ROTARY_AXES):
            raise ValueError(
                f"found {channels}; must be a multiple of 6, pairs of channels for the row, the "
                "column and the frame of a token; choose hidden_size and num_attention_heads so"
            )
        return channels

    @field_validator("patch")
    @classmethod
    def _keeps_frames_apart(cls, patch: list[int]) -> list[int]:
        if patch[0] != 1:
            raise ValueError(
                f"found {patch}; the first must be 1, since the condition mask tells frames apart"
            )
        return patch

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        filled = dict(values)
        if isinstance(values.get("preset"), str):
            try:
                filled = {**model_preset(values["preset"], VIDEO_PRESETS), **values}
            except ValueError as unknown:  # its own type lets the loader name the line of `preset`
                raise PydanticCustomError("unknown_preset", "{m}", {"m": str(unknown)}) from None
        hidden_size, heads = filled.get("hidden_size"), filled.get("num_attention_heads")
        if isinstance(hidden_size, int):
            filled.setdefault("ffn_hidden_size", 4 * hidden_size)
            if isinstance(heads, int) and heads > 0:
                filled.setdefault("kv_channels", hidden_size // heads)
        return filled
