from __future__ import annotations

import pytest

from megatron_curr.plan.model_size import model_flops_per_token, num_parameters
from megatron_curr.recipe.schema import Model


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
    ],
)
def test_parameters_of_published_models(preset: str, count: int) -> None:
    model = Model.model_validate({"preset": preset})
    assert num_parameters(model, vocab_size=model.vocab_size) == count


def test_flops_of_llama3_8b() -> None:
    model = Model.model_validate({"preset": "llama3_8b"})
    flops = model_flops_per_token(model, vocab_size=128_256, seq_length=8_192)
    matrices = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128_256
    assert flops == 6 * matrices + 12 * 32 * 4096 * 8192
