from __future__ import annotations

import pytest
from pydantic import ValidationError

from megatron_curr.recipe.presets import VIDEO_PRESETS, preset_names
from megatron_curr.recipe.video_model import VideoDiT


def test_presets_give_what_a_field_does_not_override() -> None:
    model = VideoDiT.model_validate({"preset": "dit_10b", "num_layers": 4})
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (4, 3456, 13824)
    assert model.kv_channels == 72 and model.patch == [1, 2, 2]
    for name in preset_names(VIDEO_PRESETS):
        assert VideoDiT.model_validate({"preset": name}).preset == name


def test_borders_that_fill_no_patch_count_as_tokens() -> None:
    model = VideoDiT.model_validate({"preset": "dit_debug"})
    assert model.num_patches((3, 4, 6)) == 18
    assert model.num_patches((3, 5, 6)) == 27


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": "dit_10"}, "did you mean 'dit_10b'?"),
        ({"num_attention_heads": 36}, "found 8; must be a multiple of 6"),
        ({"kv_channels": 40}, "found 40; must be a multiple of 6"),
        ({"patch": [2, 2, 2]}, r"found \[2, 2, 2\]; the first must be 1"),
    ],
)
def test_what_no_model_can_be_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VideoDiT.model_validate({"preset": "dit_debug", **fields})
