"""Autoencoders saved by diffusers, by local folder: image ones a frame at a time, video ones whole.

Latents are the mode of the posterior, so they are the same every time. What the folder says of
normalisation (``latents_mean`` and ``latents_std``, or ``shift_factor`` and ``scaling_factor``)
becomes the record's mean and std.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_curr.data.codecs import Frames, whole_latents
from megatron_curr.data.tensor_file import Floats
from megatron_curr.data.video_manifest import CodecRecord
from megatron_curr.errors import DataError

_BATCH_FRAMES = 16  # of an image autoencoder at once
_PROBE_PIXELS = 64


def folder_sha256(folder: Path) -> str:
    """Of the settings and weights in a model folder, by name and content."""
    digest = hashlib.sha256()
    kinds = {".json", ".safetensors", ".bin", ".model", ".txt"}
    for path in sorted(path for path in folder.iterdir() if path.suffix in kinds):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as stream:
            while piece := stream.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


class DiffusersCodec:
    """``compression`` is measured on a small clip, so that no class needs a rule of its own."""

    def __init__(self, folder: Path) -> None:
        self.name = f"diffusers:{folder}"
        self._model, config = _load(folder)
        self._takes_video = _takes_video(self._model)
        latents = self._posterior(torch.zeros(1, 3, 1, _PROBE_PIXELS, _PROBE_PIXELS))
        channels, side = latents.shape[1], _PROBE_PIXELS // latents.shape[-1]
        self._time = _time_compression(config, self._model) if self._takes_video else 1
        self.chunk_frames = None if self._takes_video else 1
        mean, std = _normalisation(config, channels)
        self.record = CodecRecord(
            name=self.name,
            sha256=folder_sha256(folder),
            compression=(self._time, side, side),
            channels=channels,
            mean=mean,
            std=std,
            input_range=(-1.0, 1.0),
        )
        self._mean = torch.tensor(mean)[None, :, None, None, None]
        self._std = torch.tensor(std)[None, :, None, None, None]

    def check_frames(self, num_frames: int) -> None:
        if self._time == 1 or num_frames % self._time == 1:
            return
        low = (num_frames - 1) // self._time * self._time + 1
        raise DataError(
            f"num_frames {num_frames}: {self.name} takes one frame and then {self._time} at a "
            f"time; take {low} or {low + self._time}"
        )

    @torch.inference_mode()
    def encode(self, frames_FHWC: Frames) -> Floats:
        frames_FHWC = whole_latents(frames_FHWC, self.record.compression[1])
        pixels = torch.from_numpy(np.ascontiguousarray(frames_FHWC)).float() / 127.5 - 1
        raw = self._posterior(pixels.permute(3, 0, 1, 2)[None])
        latents: Floats = ((raw - self._mean) / self._std)[0].float().numpy()
        return latents

    @torch.inference_mode()
    def decode(self, latents_CTYX: Floats) -> Frames:
        raw = torch.from_numpy(latents_CTYX)[None] * self._std + self._mean
        if self._takes_video:
            pixels = self._model.decode(raw).sample[0]
        else:
            decoded = [self._model.decode(piece).sample for piece in _batches(raw)]
            pixels = torch.cat(decoded).transpose(0, 1)
        frames: Frames = (
            ((pixels.permute(1, 2, 3, 0).float() + 1) * 127.5)
            .round()
            .clamp(0, 255)
            .to(torch.uint8)
            .numpy()
        )
        return frames

    @torch.inference_mode()
    def _posterior(self, pixels_BCFHW: torch.Tensor) -> torch.Tensor:
        """The mode [B, C, T, Y, X], not normalised; B is 1."""
        if self._takes_video:
            mode: torch.Tensor = self._model.encode(pixels_BCFHW).latent_dist.mode()
            return mode
        modes = [self._model.encode(piece).latent_dist.mode() for piece in _batches(pixels_BCFHW)]
        return torch.cat(modes).transpose(0, 1)[None]


def _batches(video_BCFHW: torch.Tensor) -> list[torch.Tensor]:
    """The frames of one clip, some at a time, [F, C, H, W]."""
    frames = video_BCFHW[0].transpose(0, 1)
    return [frames[at : at + _BATCH_FRAMES] for at in range(0, len(frames), _BATCH_FRAMES)]


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    try:
        import diffusers
    except ImportError as error:
        raise DataError(
            f"diffusers:{folder}: needs diffusers; pip install 'megatron-curr[video]'"
        ) from error
    try:
        config = json.loads((folder / "config.json").read_bytes())
        kind = getattr(diffusers, config["_class_name"])
        model = kind.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        raise DataError(
            f"diffusers:{folder}: cannot be loaded ({error}); give the folder that holds the "
            "autoencoder's config.json and weights (often called vae)"
        ) from error
    return model.eval().requires_grad_(False), config


def _takes_video(model: Any) -> bool:
    return any(isinstance(module, torch.nn.Conv3d) for module in model.modules())


def _time_compression(config: dict[str, Any], model: Any) -> int:
    for place in (config, vars(model)):
        for name in ("temporal_compression_ratio", "scale_factor_temporal"):
            if isinstance(place.get(name), int):
                return int(place[name])
    return int(getattr(model, "temporal_compression_ratio", 4))


def _normalisation(
    config: dict[str, Any], channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        return tuple(map(float, mean)), tuple(map(float, std))
    shift = float(config.get("shift_factor") or 0.0)
    return (shift,) * channels, (1 / float(config.get("scaling_factor") or 1.0),) * channels
