"""Presets are the published models: counted by table, by plan and by transformers, unallocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_curr.convert.hf_config import choose_family, write_config
from megatron_curr.plan.model_size import num_active_parameters, num_parameters
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.presets import preset_names


@pytest.mark.parametrize(
    ("name", "published", "active"),
    [
        ("llama3_8b", 8_030_261_248, 8_030_261_248),
        ("llama3_1_8b", 8_030_261_248, 8_030_261_248),
        ("qwen3_8b", 8_190_735_360, 8_190_735_360),
        ("mixtral_8x7b", 46_702_792_704, 12_879_925_248),
        ("qwen3_30b_a3b", 30_532_122_624, 3_353_032_704),
        ("deepseek_v3", 671_026_404_352, 37_552_282_624),
    ],
)
def test_counts_are_the_published_ones(
    tmp_path: Path, name: str, published: int, active: int
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    model = Model.model_validate({"preset": name})
    vocab_size = model.vocab_size
    assert vocab_size
    assert num_parameters(model, vocab_size=vocab_size) == published
    assert num_active_parameters(model, vocab_size=vocab_size) == active
    family = choose_family(model)
    fields = write_config(model, family, vocab_size=vocab_size, token_ids={}, dtype="bfloat16")
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(weight.numel() for weight in theirs.parameters()) == published
    pieces = [
        piece
        for piece in family.pieces(model, vocab_size=vocab_size)
        if not piece.stored.endswith("expert_bias")  # a buffer
    ]
    assert sum(piece.num_values for piece in pieces) == published


def test_every_preset_is_of_a_family() -> None:
    for name in preset_names():
        model = Model.model_validate({"preset": name})
        pieces = choose_family(model).pieces(model, vocab_size=model.vocab_size or 1000)
        assert sum(piece.num_values for piece in pieces) >= num_parameters(
            model, vocab_size=model.vocab_size or 1000
        )
    telechat = Model.model_validate({"preset": "telechat2_115b"})
    assert choose_family(telechat).architecture == "TeleChat2ForCausalLM"
    assert num_parameters(telechat, vocab_size=131_072) == 113_282_916_352
