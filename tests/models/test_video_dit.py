"""The video transformer on one rank is the reference written from the release's facts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from megatron_curr.models import dit_layer, rope3d, video_dit
from megatron_curr.models.patches import Grid, local_patches, whole_video
from megatron_curr.models.video_dit import VideoDiT
from megatron_curr.parallel.groups import Groups
from megatron_curr.plan.dit import dit_parameters
from megatron_curr.plan.video_flops import sample_flops
from megatron_curr.recipe.presets import VIDEO_PRESETS, preset_names
from megatron_curr.recipe.video_model import VideoDiT as Model
from megatron_curr.sample.flow import schedule
from tests.models.videos import (
    Videos,
    build_dit,
    difference,
    doubled,
    predict,
    reference,
    released,
    tiny_dit,
    videos,
)
from tests.parallel.layouts import layout

TOLERANCE = 1e-5  # of fp32, relative
Shape = tuple[int, ...]


def off_by(dit: VideoDiT, batch: Videos) -> float:
    """How far the model is from the reference, over the samples."""
    ours, weights = predict(dit, batch), released(dit)
    return max(
        difference(ours[sample], reference(weights, batch, sample)) for sample in range(len(ours))
    )


@pytest.mark.parametrize("shape", [(3, 4, 6), (1, 2, 2), (2, 5, 3)])
def test_whole_model_is_the_reference(dit: VideoDiT, shape: tuple[int, int, int]) -> None:
    assert off_by(dit, videos(dit.model, *shape, samples=(0, 1, 5))) < TOLERANCE


def test_every_block_is_the_reference_s(groups: Groups, batch: Videos) -> None:
    dit = build_dit(groups, tiny_dit(num_layers=3)).double()
    found: list[Tensor] = []
    for layer in dit.decoder.layers:
        layer.register_forward_hook(lambda module, inputs, output: found.append(output))
    ours, weights = predict(dit, doubled(batch)), released(dit)
    for sample in range(2):
        expected: list[Tensor] = []
        whole = reference(weights, doubled(batch), sample, blocks=expected)
        for ours_SBD, theirs_SD in zip(found, expected, strict=True):
            assert difference(ours_SBD[:, sample], theirs_SD) < 1e-13
        assert difference(ours[sample], whole) < 1e-13


def exact_gelu(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    for layer in dit.decoder.layers:
        patch.setattr(layer.mlp, "activation_func", torch.nn.functional.gelu)


def text_norms_of_the_training_code(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dit.context_embedder, "eps", 1e-5)


def halves_turned_together(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    def rotate(x_SBNH: Tensor, table: Tensor) -> Tensor:
        cosines, sines = table
        first, second = x_SBNH.chunk(2, dim=-1)
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)

    patch.setattr(dit_layer, "rotate", rotate)


def end_tokens_noised(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    def mask(*args: Tensor, **kwargs: object) -> Tensor:
        whole = right(*args, **kwargs)
        whole[:, [0, -1]] = True
        return whole

    right = video_dit.local_frame_mask
    patch.setattr(video_dit, "local_frame_mask", mask)


def first_frame_counted_from_zero(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    def places(*args: object) -> Tensor:
        return (right(*args) - torch.tensor([0, 0, 1])).clamp(min=0)

    right = rope3d.token_places
    patch.setattr(rope3d, "token_places", places)


def end_token_in_the_last_frame(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    def places(grid: Grid, positions_S: Tensor) -> Tensor:
        return right(grid, positions_S).clamp(max=grid.frames)

    right = rope3d.token_places
    patch.setattr(rope3d, "token_places", places)


def frames_turned_first(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    right = rope3d.token_places
    patch.setattr(rope3d, "token_places", lambda *args: right(*args).roll(1, dims=1))


def final_layer_modulated_as_the_layers_are(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    def forward(hidden: Tensor, embedding_RBD: Tensor, noised_SB: Tensor) -> Tensor:
        of_layers = dit.timestep_block(embedding_RBD)[..., : embedding_RBD.shape[-1]]
        return right(hidden, of_layers, noised_SB)

    right = dit.final_layer.forward
    patch.setattr(dit.final_layer, "forward", forward)


def sines_first(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    from megatron_curr.models import conditioning

    right = conditioning.sinusoids
    patch.setattr(
        conditioning, "sinusoids", lambda x, width: right(x, width).roll(width // 2, dims=1)
    )


def cross_attention_gated(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    for layer in dit.decoder.layers:
        right = layer.cross_attention.forward
        patch.setattr(
            layer.cross_attention, "forward", lambda *args, right=right: 0.5 * right(*args)
        )


WRONG_VERSIONS = [
    exact_gelu,
    text_norms_of_the_training_code,
    halves_turned_together,
    end_tokens_noised,
    first_frame_counted_from_zero,
    end_token_in_the_last_frame,
    frames_turned_first,
    final_layer_modulated_as_the_layers_are,
    sines_first,
    cross_attention_gated,
]


@pytest.fixture(scope="module")
def exact_dit(groups: Groups) -> VideoDiT:
    return build_dit(groups).double()


@pytest.mark.parametrize("make_wrong", WRONG_VERSIONS)
def test_each_known_mistake_would_be_told(
    exact_dit: VideoDiT,
    batch: Videos,
    monkeypatch: pytest.MonkeyPatch,
    make_wrong: Callable[[VideoDiT, pytest.MonkeyPatch], None],
) -> None:
    quiet_text = replace(doubled(batch), text_BLE=batch.text_BLE.double() / 300)  # epsilon matters
    assert off_by(exact_dit, quiet_text) < 1e-13
    make_wrong(exact_dit, monkeypatch)
    assert off_by(exact_dit, quiet_text) > 3e-5  # the exact GELU: 6e-5, the others 2e-3 and more


def test_rows_of_queries_keys_and_values_taken_as_they_lie_would_be_told(
    dit: VideoDiT, batch: Videos
) -> None:
    weights = released(dit)
    for name, parameter in dit.named_parameters():
        if name.startswith("decoder.layers.0.self_attention.linear_qkv"):
            weights[f"blocks.0.attn.qkv.{name.rpartition('.')[2]}"] = parameter.detach()
    assert difference(predict(dit, batch)[0], reference(weights, batch, 0)) > 1e-3


def test_padded_text_changes_nothing(dit: VideoDiT, batch: Videos) -> None:
    padding = torch.full_like(batch.text_BLE[:, :5], 1e4)
    padded = replace(batch, text_BLE=torch.cat([batch.text_BLE, padding], dim=1))
    for sample, length in enumerate(batch.text_lengths_B):
        padded.text_BLE[sample, length:] = 1e4
    assert difference(predict(dit, padded), predict(dit, batch)) < 1e-6


def test_a_text_without_tokens_says_nothing(dit: VideoDiT, batch: Videos) -> None:
    empty = replace(batch, text_lengths_B=torch.zeros_like(batch.text_lengths_B))
    output = dit(**empty.arguments())
    output.square().mean().backward()
    assert torch.isfinite(output).all()
    for parameter in dit.context_embedder.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    other = replace(empty, text_BLE=empty.text_BLE + 1)
    assert torch.equal(dit(**other.arguments()), output)
    dit.zero_grad()


def test_padded_places_change_neither_output_nor_gradient(
    dit: VideoDiT, batch: Videos, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[Tensor, list[Tensor]]:
        output = dit(**batch.arguments())[:, 1:19]
        output.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in dit.parameters()]
        dit.zero_grad()
        return output.detach(), gradients

    bare, bare_gradients = run()
    monkeypatch.setattr(Grid, "padded_length", lambda grid, groups: grid.num_tokens + 11)
    padded, padded_gradients = run()
    assert difference(padded, bare) < 1e-6
    for ours, theirs in zip(padded_gradients, bare_gradients, strict=True):
        assert difference(ours, theirs) < TOLERANCE


def test_at_timestep_0_the_frame_mask_has_no_effect(dit: VideoDiT, batch: Videos) -> None:
    clean = replace(batch, timesteps_B=torch.zeros(2))
    all_noised = replace(clean, frame_mask_BT=torch.ones_like(batch.frame_mask_BT))
    assert torch.equal(predict(dit, clean), predict(dit, all_noised))
    assert difference(predict(dit, batch), predict(dit, clean)) > 1e-3


def test_released_models_see_timesteps_rounded_to_bf16(groups: Groups, batch: Videos) -> None:
    """Of the release's 25 steps at 720p, bf16 moves 24, by up to 1.9 of 1000."""
    times = torch.tensor(schedule(25, shift=7.02)[:-1]) * 1000
    moved = (times.bfloat16().float() - times).abs()
    assert (moved > 0).sum() == 24 and 1.8 < moved.max() < 2
    released = build_dit(groups, tiny_dit(round_timesteps=True), precision="bf16")
    plain = build_dit(groups, precision="bf16")
    between = replace(batch, timesteps_B=torch.tensor([897.3, 611.7]))
    rounded = replace(batch, timesteps_B=between.timesteps_B.bfloat16().float())
    assert torch.equal(predict(released, between), predict(plain, rounded))
    assert not torch.equal(predict(released, between), predict(plain, between))
    in_fp32 = build_dit(groups, tiny_dit(round_timesteps=True))
    assert torch.equal(predict(in_fp32, between), predict(build_dit(groups), between))


def test_bf16_agrees_to_its_precision(groups: Groups, batch: Videos) -> None:
    fp32, bf16 = build_dit(groups), build_dit(groups, precision="bf16")
    output = bf16(**batch.arguments())
    assert output.dtype is torch.float32
    output.sum().backward()
    assert {parameter.grad.dtype for parameter in bf16.parameters()} == {torch.bfloat16}
    assert difference(predict(bf16, batch), predict(fp32, batch)) < 0.03


class Largest(TorchDispatchMode):
    """The most numbers in any tensor made, and every dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            # A view of a row for every token is no memory.
            if isinstance(tensor, Tensor) and 0 not in tensor.stride():
                self.numel = max(self.numel, tensor.numel())
                self.dtypes.add(tensor.dtype)
        return made


def test_modulation_is_never_held_for_every_token_nor_in_fp64(groups: Groups) -> None:
    dit = build_dit(groups, tiny_dit(num_layers=1, ffn_hidden_size=48))
    batch = videos(dit.model, 5, 12, 12)
    tokens = len(batch.fps_B) * (5 * 36 + 2)
    with Largest() as largest:
        output = dit(**batch.arguments())
        rotation_is_fp64 = torch.float64 in largest.dtypes
        largest.dtypes.clear()
        output.square().sum().backward()
    assert largest.numel <= 3 * tokens * 48  # queries, keys and values; modulation would be twice
    assert rotation_is_fp64 and torch.float64 not in largest.dtypes


def test_text_is_not_gathered_once_for_each_tensor_rank() -> None:
    parallel = layout(tp=2, sequence_parallel=True)
    config = video_dit.video_transformer_config(tiny_dit(), parallel=parallel, precision="fp32")
    seen = dit_layer._linear_of_whole_text(lambda config: config, config=config)
    assert config.sequence_parallel and not seen.sequence_parallel


def test_patches_and_video_are_each_other_s_inverse(groups: Groups) -> None:
    video = torch.randn(2, 3, 3, 5, 7)
    patches = local_patches(video, patch=(1, 2, 2), groups=groups)
    assert patches.shape == (2, 3 * 3 * 4 + 2, 12) and not patches[:, [0, -1]].any()
    again = whole_video(patches, latent_shape=video.shape, patch=(1, 2, 2), groups=groups)
    assert torch.equal(again, video)


@pytest.mark.parametrize(
    ("preset", "published"),
    [
        ("dit_debug", 0.0048e9),
        ("dit_1b", 1.208e9),
        ("dit_4b", 4.818e9),
        ("dit_10b", 10_830_321_984),
        ("dit_18b", 19.245e9),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset: str, published: float) -> None:
    count = dit_parameters(Model.model_validate({"preset": preset}))
    assert count == published if isinstance(published, int) else abs(count / published - 1) < 0.01
    assert preset in preset_names(VIDEO_PRESETS)


def attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def attention_backward_flops(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object
) -> int:
    """Of the gradients; that the kernel works scores out again is no work of the model."""
    return 2 * sdpa_flop_count(query, key, value)


# torch counts the kernels of other devices only.
ATTENTION_ON_A_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}


def test_parameters_and_flops_are_those_of_the_closed_form(groups: Groups) -> None:
    model = tiny_dit(num_layers=8, in_channels=24, out_channels=48)
    dit = build_dit(groups, model)
    assert sum(parameter.numel() for parameter in dit.parameters()) == dit_parameters(model)
    batch = videos(model, 4, 8, 12, samples=(1,))
    with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_A_CPU) as counter:
        dit(**batch.arguments()).sum().backward()
    counted = counter.get_total_flops()
    expected = sample_flops(model, num_patches=96, text_tokens=model.max_text_tokens)
    assert abs(counted / expected - 1) < 0.01
