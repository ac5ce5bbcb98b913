from __future__ import annotations

import pytest

from megatron_curr.plan.model_size import num_active_parameters, num_parameters
from megatron_curr.recipe.model import Model


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
        ("mixtral_8x7b", 46_702_792_704),
        ("qwen3_30b_a3b", 30_532_122_624),
    ],
)
def test_parameters_of_published_models(preset: str, count: int) -> None:
    model = Model.model_validate({"preset": preset})
    assert num_parameters(model, vocab_size=model.vocab_size) == count


@pytest.mark.parametrize(
    ("preset", "published_billions", "count"),
    [("mixtral_8x7b", 12.9, 12_879_925_248), ("qwen3_30b_a3b", 3.3, 3_353_032_704)],
)
def test_active_parameters_of_published_models(
    preset: str, published_billions: float, count: int
) -> None:
    model = Model.model_validate({"preset": preset})
    active = num_active_parameters(model, vocab_size=model.vocab_size)
    assert active == count
    assert active / 1e9 == pytest.approx(published_billions, abs=0.06)


def test_every_weight_of_a_dense_model_is_active() -> None:
    model = Model.model_validate({"preset": "qwen3_0_6b"})
    sizes = {size(model, vocab_size=151_936) for size in (num_parameters, num_active_parameters)}
    assert len(sizes) == 1


def test_layers_without_experts_and_shared_experts_are_counted() -> None:
    model = Model.model_validate(
        {
            "preset": "mixtral_8x7b",
            "moe_layer_freq": 2,
            "moe_ffn_hidden_size": 7168,
            "moe_shared_expert_intermediate_size": 1024,
        }
    )
    dense = Model.model_validate({"preset": "mixtral_8x7b", "num_moe_experts": None})
    a_layer_more = 4096 * 8 + 3 * 4096 * (8 * 7168 + 1024 - 14336)
    more = num_parameters(model, vocab_size=1) - num_parameters(dense, vocab_size=1)
    assert more == 16 * a_layer_more
