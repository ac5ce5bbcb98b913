"""The MUG-V autoencoder, by local file: 8 frames of 8 x 8 pixels to 24 channels, in two halves.

An image autoencoder of Stable Diffusion XL's kind, without its innermost layers, makes features of
every frame; a network over time makes one latent of the features of 8 frames, each 8 frames by
themselves, and takes 6 latents at a time back. Names, sizes and the order of things are those of
MUG-V's public inference code (Shopee-MUG/MUG-V, ``mug_v/encoder/vae``, Apache-2.0); widths are read
from the file. Latents are the mode of the posterior, so they are the same every time, where
MUG-V's code draws from it. Never compared with the released weights, which cannot be had here.

Legend: N frames or chunks, C channels, T time, H W rows and columns.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from megatron_curr.data.codecs import Frames, check_chunks, whole_chunks
from megatron_curr.data.tensor_file import Floats
from megatron_curr.data.video_manifest import CodecRecord
from megatron_curr.errors import DataError

CHUNK_FRAMES = 8  # encoded together
WINDOW_LATENTS = 6  # decoded together
MULTIPLIERS = (1, 2, 2, 4)  # of the first width, along the network over time
NUM_RES_BLOCKS = 4
NUM_GROUPS = 32
FEATURE_SCALE = 0.18215
_BATCH_FRAMES = 16
# In the file, as its class has them, and never run.
_UNUSED = re.compile(
    r"logvar|spatial_vae\.module\.(encoder\.conv_(norm_)?out|decoder\.conv_in)\..*"
)


class TimeConv(nn.Module):
    """A convolution over time and space that keeps the size, or halves the time at stride 2."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        side, time = kernel // 2, kernel - stride
        self._pad = (side, side, side, side, time // 2, time - time // 2)
        self.conv = nn.Conv3d(channels_in, channels_out, kernel, stride=(stride, 1, 1), bias=bias)

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        return self.conv(F.pad(x_NCTHW, self._pad))  # type: ignore[no-any-return]


class ResBlock(nn.Module):
    """Two normalised convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NUM_GROUPS, channels_in)
        self.conv1 = TimeConv(channels_in, channels_out, bias=False)
        self.norm2 = nn.GroupNorm(NUM_GROUPS, channels_out)
        self.conv2 = TimeConv(channels_out, channels_out, bias=False)
        self.conv3 = (
            nn.Identity()
            if channels_in == channels_out
            else TimeConv(channels_in, channels_out, 1, bias=False)
        )

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x_NCTHW)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return self.conv3(x_NCTHW) + hidden  # type: ignore[no-any-return]


def _res_blocks(channels_in: int, channels_out: int) -> nn.Sequential:
    rest = [ResBlock(channels_out, channels_out) for _ in range(NUM_RES_BLOCKS - 1)]
    return nn.Sequential(ResBlock(channels_in, channels_out), *rest)


class TimeEncoder(nn.Module):
    """Features [N, C, 8, H, W] to moments [N, 2 x 24, 1, H, W], before ``quant_conv``."""

    def __init__(self, features: int, filters: int, channels: int) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in MULTIPLIERS]
        self.conv_in = TimeConv(features, filters, bias=False)
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(before, width)
            for before, width in zip([filters, *widths], widths, strict=False)
        )
        self.conv_blocks = nn.ModuleList(TimeConv(w, w, stride=2) for w in widths[:-1])
        self.res_blocks = _res_blocks(widths[-1], widths[-1])
        self.norm1 = nn.GroupNorm(NUM_GROUPS, widths[-1])
        self.conv2 = TimeConv(widths[-1], 2 * channels, 1)

    def forward(self, x_NCTHW: Tensor) -> Tensor:
        x = self.conv_in(x_NCTHW)
        for blocks, halve in zip(
            self.block_res_blocks, [*self.conv_blocks, nn.Identity()], strict=True
        ):
            x = halve(blocks(x))
        x = self.norm1(self.res_blocks(x))
        return self.conv2(F.silu(x))  # type: ignore[no-any-return]


class TimeDecoder(nn.Module):
    """Latents [N, 24, T, H, W] to features [N, C, 8 T, H, W]: time doubles three times."""

    def __init__(self, features: int, filters: int, channels: int) -> None:
        super().__init__()
        widths = [filters * multiplier for multiplier in MULTIPLIERS]
        self.conv1 = TimeConv(channels, widths[-1])
        self.res_blocks = _res_blocks(widths[-1], widths[-1])
        self.upsample_block = ResBlock(widths[-1], widths[-1])
        self.block_res_blocks = nn.ModuleList(
            _res_blocks(before, width)
            for before, width in zip([*widths[1:], widths[-1]], widths, strict=True)
        )
        doubling = [TimeConv(width, 2 * width) for width in widths[2:]]
        self.conv_blocks = nn.ModuleList([nn.Identity(), *doubling])
        self.norm1 = nn.GroupNorm(NUM_GROUPS, filters)
        self.conv_out = TimeConv(filters, features)

    def forward(self, z_NCTHW: Tensor) -> Tensor:
        x = self.res_blocks(self.conv1(z_NCTHW))
        x = self.upsample_block(x.repeat_interleave(2, dim=2))
        for level in reversed(range(len(MULTIPLIERS))):
            x = self.block_res_blocks[level](x)
            if level > 1:
                x = self.conv_blocks[level - 1](x).unflatten(1, (-1, 2))
                x = x.transpose(2, 3).flatten(2, 3)  # pairs of channels become pairs of frames
        return self.conv_out(F.silu(self.norm1(x)))  # type: ignore[no-any-return]


class MugvAutoencoder(nn.Module):
    """Both halves, under the names of the released file; ``channels`` of a latent."""

    shift: Tensor
    scale: Tensor

    def __init__(
        self, widths: tuple[int, ...] = (128, 256, 512, 512), filters: int = 128, channels: int = 24
    ) -> None:
        import diffusers

        super().__init__()
        autoencoder_kl: Any = diffusers.AutoencoderKL
        spatial = autoencoder_kl(
            block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths),
            up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=2,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        for name in ("conv_norm_out", "conv_act", "conv_out"):
            setattr(spatial.encoder, name, nn.Identity())
        spatial.decoder.conv_in = nn.Identity()
        self.spatial_vae = nn.ModuleDict({"module": spatial})
        self.temporal_vae = nn.ModuleDict(
            {
                "encoder": TimeEncoder(widths[-1], filters, channels),
                "quant_conv": TimeConv(2 * channels, 2 * channels, 1),
                "post_quant_conv": TimeConv(channels, channels, 1),
                "decoder": TimeDecoder(widths[-1], filters, channels),
            }
        )
        self.register_buffer("shift", torch.zeros(1, channels, 1, 1, 1))
        self.register_buffer("scale", torch.ones(1, channels, 1, 1, 1))

    def encode(self, pixels_NCHW: Tensor) -> Tensor:
        """Frames, a multiple of 8, from -1 to 1: normalised latents [1, 24, T, H, W]."""
        spatial: Any = self.spatial_vae["module"]
        temporal = self.temporal_vae
        features = torch.cat(
            [spatial.encoder(part) for part in torch.split(pixels_NCHW, _BATCH_FRAMES)]
        )
        modes = []
        for chunk_TCHW in torch.split(features * FEATURE_SCALE, CHUNK_FRAMES):
            moments = temporal["quant_conv"](temporal["encoder"](chunk_TCHW.transpose(0, 1)[None]))
            modes.append(moments.chunk(2, dim=1)[0])
        return (torch.cat(modes, dim=2) - self.shift) / self.scale

    def decode(self, latents_1CTHW: Tensor) -> Tensor:
        """Frames [8 T, 3, H, W], of which only values from -1 to 1 are colours."""
        spatial: Any = self.spatial_vae["module"]
        temporal = self.temporal_vae
        raw = latents_1CTHW * self.scale + self.shift
        frames = []
        for window in torch.split(raw, WINDOW_LATENTS, dim=2):
            features = temporal["decoder"](temporal["post_quant_conv"](window))
            frames_TCHW = (features[0] / FEATURE_SCALE).transpose(0, 1)
            frames += [spatial.decoder(part) for part in torch.split(frames_TCHW, _BATCH_FRAMES)]
        return torch.cat(frames)


class MugvCodec:
    """``file`` is MUG-V's ``vae.pt``, or the same tensors as safetensors."""

    chunk_frames = CHUNK_FRAMES

    def __init__(self, file: Path) -> None:
        self.name = f"mugv:{file}"
        self._model = load_autoencoder(file)
        with open(file, "rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self.record = CodecRecord(
            name=self.name,
            sha256=sha256,
            compression=(CHUNK_FRAMES, 8, 8),
            channels=self._model.shift.numel(),
            mean=tuple(self._model.shift.flatten().tolist()),
            std=tuple(self._model.scale.flatten().tolist()),
            input_range=(-1.0, 1.0),
        )

    def check_frames(self, num_frames: int) -> None:
        check_chunks(num_frames, CHUNK_FRAMES, self.name)

    @torch.inference_mode()
    def encode(self, frames_FHWC: Frames) -> Floats:
        frames = np.ascontiguousarray(whole_chunks(frames_FHWC, CHUNK_FRAMES))
        pixels_NCHW = (torch.from_numpy(frames).float() / 127.5 - 1).permute(0, 3, 1, 2)
        latents: Floats = self._model.encode(pixels_NCHW)[0].numpy()
        return latents

    @torch.inference_mode()
    def decode(self, latents_CTYX: Floats) -> Frames:
        pixels_NCHW = self._model.decode(torch.from_numpy(latents_CTYX)[None])
        bytes_NCHW = ((pixels_NCHW + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        frames: Frames = bytes_NCHW.permute(0, 2, 3, 1).numpy()
        return frames


def load_autoencoder(file: Path) -> MugvAutoencoder:
    """Raises ``DataError`` that names the first tensor missing, unknown or of another shape."""
    tensors = {name: value for name, value in _read(file).items() if not _UNUSED.fullmatch(name)}
    try:
        with torch.device("meta"):
            model = MugvAutoencoder(*_widths(tensors))
    except ImportError as error:
        raise DataError(
            f"mugv:{file}: needs diffusers; pip install 'megatron-curr[video]'"
        ) from error
    except (KeyError, IndexError, ValueError) as error:
        raise DataError(f"mugv:{file}: not MUG-V's autoencoder ({error})") from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for name in sorted(wanted.keys() | tensors.keys()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != wanted.get(name):
            raise DataError(
                f"mugv:{file}: {name} is {found or 'missing'}, where MUG-V's autoencoder has "
                f"{wanted.get(name, 'no such tensor')}; give the vae.pt of its release"
            )
    model.load_state_dict({name: t.float() for name, t in tensors.items()}, assign=True)
    return model.eval().requires_grad_(False)


def _widths(tensors: Mapping[str, Tensor]) -> tuple[tuple[int, ...], int, int]:
    name = "spatial_vae.module.encoder.down_blocks.{}.resnets.0.conv1.weight"
    widths = tuple(tensors[name.format(level)].shape[0] for level in range(4))
    filters = tensors["temporal_vae.encoder.conv_in.conv.weight"].shape[0]
    return widths, filters, tensors["temporal_vae.post_quant_conv.conv.weight"].shape[0]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"mugv:{file}: cannot be read ({reason}); give MUG-V's vae.pt, or the same tensors as "
            ".safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise DataError(f"mugv:{file}: holds no tensors by name; give MUG-V's vae.pt")
    return found
