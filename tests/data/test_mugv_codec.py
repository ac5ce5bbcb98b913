"""MUG-V's autoencoder at toy widths, beside a plain-torch one that follows the published order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from data_tools.make_video_demo import draw, scene
from megatron_curr.data.codecs import load_codec
from megatron_curr.data.mugv_codec import MugvAutoencoder
from megatron_curr.errors import DataError

WIDTHS, FILTERS = (32, 32, 32, 64), 32
SPATIAL = "spatial_vae.module."
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Everything that the released file names, the layers that are never run too."""
    torch.manual_seed(0)
    found = MugvAutoencoder(WIDTHS, FILTERS).state_dict()
    found["shift"], found["scale"] = torch.randn(1, 24, 1, 1, 1), torch.rand(1, 24, 1, 1, 1) + 0.5
    unused = {SPATIAL + name: value for name, value in spatial_vae().state_dict().items()}
    return {**unused, **found, "logvar": torch.tensor(4.0)}


@pytest.fixture(scope="module")
def file(state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mugv") / "vae.pt"
    torch.save(state, path)
    return path


def spatial_vae() -> AutoencoderKL:
    """diffusers' own, whole: what its encoder's middle gives and its decoder's middle takes."""
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def loaded_spatial_vae(state: State) -> AutoencoderKL:
    vae = spatial_vae()
    mine = {k.removeprefix(SPATIAL): v for k, v in state.items() if k.startswith(SPATIAL)}
    vae.load_state_dict(mine, strict=True)
    return vae


class TimeReference:
    """The network over time, straight from the names of its tensors."""

    def __init__(self, state: State) -> None:
        self.state = {
            k.removeprefix("temporal_vae."): v for k, v in state.items() if "temporal" in k
        }

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.conv.weight"]
        if weight.shape[-1] == 3:
            x = F.pad(x, (1, 1, 1, 1, 1 if stride == 1 else 0, 1))
        return F.conv3d(x, weight, self.state.get(f"{name}.conv.bias"), stride=(stride, 1, 1))

    def norm(self, name: str, x: Tensor) -> Tensor:
        x = F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-5)
        return x * torch.sigmoid(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        hidden = self.conv(f"{name}.conv1", self.norm(f"{name}.norm1", x))
        hidden = self.conv(f"{name}.conv2", self.norm(f"{name}.norm2", hidden))
        has_shortcut = f"{name}.conv3.conv.weight" in self.state
        return hidden + (self.conv(f"{name}.conv3", x) if has_shortcut else x)

    def blocks(self, name: str, x: Tensor) -> Tensor:
        for number in range(4):
            x = self.block(f"{name}.{number}", x)
        return x

    def encode(self, features_1C8HW: Tensor) -> Tensor:
        x = self.conv("encoder.conv_in", features_1C8HW)
        for level in range(4):
            x = self.blocks(f"encoder.block_res_blocks.{level}", x)
            if level < 3:
                x = self.conv(f"encoder.conv_blocks.{level}", x, stride=2)
        x = self.norm("encoder.norm1", self.blocks("encoder.res_blocks", x))
        return self.conv("quant_conv", self.conv("encoder.conv2", x))[:, :24]

    def decode(self, latents: Tensor) -> Tensor:
        x = self.conv("decoder.conv1", self.conv("post_quant_conv", latents))
        x = self.blocks("decoder.res_blocks", x)
        x = self.block("decoder.upsample_block", F.interpolate(x, scale_factor=(2, 1, 1)))
        for level in (3, 2, 1, 0):
            x = self.blocks(f"decoder.block_res_blocks.{level}", x)
            if level > 1:
                x = self.conv(f"decoder.conv_blocks.{level - 1}", x)
                even, odd = x[:, 0::2], x[:, 1::2]
                x = torch.stack([even, odd], dim=3).flatten(2, 3)
        return self.conv("decoder.conv_out", self.norm("decoder.norm1", x))


def clip(num_frames: int) -> np.ndarray:
    return draw(scene(3), size=16, num_frames=num_frames)


@torch.no_grad()
def test_latents_and_frames_are_those_of_the_published_order(state: State, file: Path) -> None:
    codec, reference, vae = (
        load_codec(f"mugv:{file}"),
        TimeReference(state),
        loaded_spatial_vae(state),
    )
    assert codec.record.compression == (8, 8, 8) and codec.record.channels == 24
    assert codec.record.mean == tuple(state["shift"].flatten().tolist())
    frames = clip(56)
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2) / 127.5 - 1
    seen: list[Tensor] = []
    handle = vae.encoder.mid_block.register_forward_hook(lambda *call: seen.append(call[2]))
    vae.encode(pixels)
    handle.remove()
    features = seen[0].transpose(0, 1)[None] * 0.18215
    means = torch.cat([reference.encode(chunk) for chunk in features.split(8, dim=2)], dim=2)
    expected = ((means - state["shift"]) / state["scale"])[0]
    latents = codec.encode(frames)
    assert latents.shape == (24, 7, 2, 2) and latents.dtype == np.float32
    np.testing.assert_allclose(latents, expected.numpy(), atol=2e-5)

    windows = [reference.decode(window) for window in means.split(6, dim=2)]
    hidden = torch.cat(windows, dim=2)[0].transpose(0, 1) / 0.18215
    vae.decoder.conv_in = torch.nn.Identity()
    shown = ((vae.decoder(hidden) + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    decoded = codec.decode(latents)
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - shown.numpy()).max() <= 1


def test_each_eight_frames_stand_alone_and_an_image_is_a_latent(file: Path) -> None:
    codec = load_codec(f"mugv:{file}")
    frames = clip(16)
    whole, second = codec.encode(frames), codec.encode(frames[8:])
    np.testing.assert_allclose(whole[:, 1:], second, atol=1e-5)
    assert codec.encode(frames[:9]).shape[1] == 2 and codec.encode(frames[:1]).shape[1] == 1
    codec.check_frames(17)
    with pytest.raises(DataError, match=r"num_frames 12: .* take 8, 9 or 16"):
        codec.check_frames(12)


def test_a_border_that_makes_no_latent_is_left_out(file: Path) -> None:
    """As the release floors: of its sizes, 1110 columns are 138 latents."""
    for codec in (load_codec(f"mugv:{file}"), load_codec("haar")):
        frames = np.zeros((8, 28, 46, 3), np.uint8)
        latents = codec.encode(frames)
        assert latents.shape == (24, 1, 3, 5)
        assert codec.decode(latents).shape == (8, 24, 40, 3)


def test_safetensors_give_the_same_codec(state: State, file: Path, tmp_path: Path) -> None:
    save_file(state, tmp_path / "vae.safetensors")
    same = load_codec(f"mugv:{tmp_path / 'vae.safetensors'}")
    frames = clip(8)
    np.testing.assert_array_equal(same.encode(frames), load_codec(f"mugv:{file}").encode(frames))


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: without(s, "temporal_vae.quant_conv.conv.bias"),
            r"quant_conv\.conv\.bias is mis",
        ),
        (lambda s: {**s, "more": torch.ones(1)}, r"more is \(1,\), where .* no such tensor"),
        (
            lambda s: {**s, "shift": torch.ones(24)},
            r"shift is \(24,\), where .* has \(1, 24, 1, 1, 1\)",
        ),
        (lambda s: {"weight": torch.ones(1)}, "not MUG-V's autoencoder"),
        (lambda s: {"model": s}, "holds no tensors by name"),
    ],
)
def test_a_file_of_something_else_is_refused(
    state: State, tmp_path: Path, change: Callable[[State], State], message: str
) -> None:
    torch.save(change(state), tmp_path / "vae.pt")
    with pytest.raises(DataError, match=message):
        load_codec(f"mugv:{tmp_path / 'vae.pt'}")


def test_a_file_that_is_not_there_or_is_no_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_codec(f"mugv:{tmp_path / 'vae.pt'}")
    (tmp_path / "vae.pt").write_text("no weights")
    with pytest.raises(DataError, match=r"cannot be read .*give MUG-V's vae\.pt"):
        load_codec(f"mugv:{tmp_path / 'vae.pt'}")
