"""A small video transformer with weights that hide nothing, and samples for it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_curr.convert.mugv import mugv_pieces
from megatron_curr.models.patches import whole_video
from megatron_curr.models.video_dit import VideoDiT as Chunk
from megatron_curr.models.video_dit import build_video_dit_chunks
from megatron_curr.parallel.full_tensors import cut_of, named_full_parameters
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.video_model import VideoDiT
from tests.models import mugv_reference
from tests.parallel.layouts import layout


def tiny_dit(**changes: Any) -> VideoDiT:
    settings = {
        "num_layers": 2,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "ffn_hidden_size": 80,
        "in_channels": 3,
        "out_channels": 6,
        "text_hidden_size": 20,
        "max_text_tokens": 8,
        "init_method_std": 0.2,
    }
    return VideoDiT.model_validate({**settings, **changes})


@dataclass(frozen=True, kw_only=True)
class Videos:
    """A micro-batch; attributes are the arguments of ``forward``."""

    latents_BCTYX: Tensor
    text_BLE: Tensor
    text_lengths_B: Tensor
    timesteps_B: Tensor
    fps_B: Tensor
    frame_mask_BT: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return dict(vars(self))


def videos(model: VideoDiT, *shape: int, samples: tuple[int, ...] = (1, 2)) -> Videos:
    """Samples of ``shape`` frames, rows, columns; sample n has n % frames clean frames at first."""
    of = [torch.Generator().manual_seed(sample) for sample in samples]
    width, most = model.text_hidden_size, model.max_text_tokens
    return Videos(
        latents_BCTYX=torch.stack(
            [torch.randn(model.in_channels, *shape, generator=own) for own in of]
        ),
        text_BLE=torch.stack([torch.randn(most, width, generator=own) for own in of]),
        text_lengths_B=torch.tensor([1 + (3 * sample) % most for sample in samples]),
        timesteps_B=torch.cat([1000 * torch.rand(1, generator=own) for own in of]),
        fps_B=torch.tensor([8.0 + 4 * sample for sample in samples]),
        frame_mask_BT=torch.stack(
            [torch.arange(shape[0]) >= sample % shape[0] for sample in samples]
        ),
    )


@torch.no_grad()
def build_dit(groups: Groups, model: VideoDiT | None = None, *, precision: str = "fp32") -> Chunk:
    """The whole model on one rank; biases and norms are random, too."""
    (chunk,) = build_video_dit_chunks(
        model or tiny_dit(), parallel=layout(), precision=precision, groups=groups
    )
    shake(chunk, groups)
    return chunk


@torch.no_grad()
def shake(chunk: torch.nn.Module, groups: Groups) -> None:
    """Move every vector by an amount that its name decides, so that no bias is zero."""
    for name, parameter in named_full_parameters(chunk):
        if parameter.dim() == 1:
            own = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            cut, size = cut_of(parameter), groups.tp_size
            whole = torch.randn(cut.full_shape(parameter.shape, size), generator=own)
            parameter += 0.3 * cut.part(whole, rank=groups.tp_rank, size=size)


def released(chunk: Chunk) -> dict[str, Tensor]:
    """The weights of a whole model under MUG-V's names."""
    ours = dict(chunk.named_parameters())
    return {
        piece.published: torch.cat(
            [ours[piece.stored].detach()[start:end] for start, end in piece.rows]
        )
        for piece in mugv_pieces(chunk.model)
    }


def reference(
    weights: dict[str, Tensor], batch: Videos, sample: int, *, blocks: list[Tensor] | None = None
) -> Tensor:
    """The reference's [C, T, Y, X] for one sample; its text has no padding."""
    return mugv_reference.velocity(
        weights,
        batch.latents_BCTYX[sample],
        batch.text_BLE[sample, : batch.text_lengths_B[sample]],
        timestep=float(batch.timesteps_B[sample]),
        fps=float(batch.fps_B[sample]),
        noised=batch.frame_mask_BT[sample].tolist(),
        num_heads=4,
        blocks=blocks,
    )


@torch.no_grad()
def predict(dit: Chunk, batch: Videos) -> Tensor:
    """[B, C, T, Y, X]."""
    return whole_video(
        dit(**batch.arguments()),
        latent_shape=batch.latents_BCTYX.shape,
        patch=dit.model.patch,
        groups=dit.groups,
    )


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Relative, of the whole."""
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))


def doubled(batch: Videos) -> Videos:
    """The same in fp64."""
    return replace(
        batch, latents_BCTYX=batch.latents_BCTYX.double(), text_BLE=batch.text_BLE.double()
    )
