import pytest

from megatron_curr.recipe.model import Model
from megatron_curr.recipe.presets import model_preset, preset_names


def num_parameters(model: Model, vocab_size: int) -> int:
    """Of a Llama-like or Mixtral-like decoder, counted by hand."""
    width, head = model.hidden_size, model.kv_channels
    query, key_value = model.num_attention_heads * head, model.num_query_groups * head
    attention = width * (2 * query + 2 * key_value) + (2 * head if model.qk_layernorm else 0)
    if model.num_moe_experts:
        hidden_rows = 3 * model.num_moe_experts * model.expert_ffn_hidden_size
        layer = attention + width * (hidden_rows + model.num_moe_experts) + 2 * width
    else:
        layer = attention + 3 * width * model.ffn_hidden_size + 2 * width
    embeddings = vocab_size * width * (2 if model.untie_embeddings_and_output_weights else 1)
    return model.num_layers * layer + embeddings + width


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("qwen3_0_6b", 596_049_920),
        ("qwen3_8b", 8_190_735_360),
        ("mixtral_8x7b", 46_702_792_704),
        ("qwen3_30b_a3b", 30_532_122_624),
    ],
)
def test_preset_has_exactly_the_published_number_of_parameters(name: str, published: int) -> None:
    model = Model.model_validate({"preset": name})
    assert model.vocab_size is not None
    assert num_parameters(model, model.vocab_size) == published


def test_llama3_8b_is_the_published_architecture() -> None:
    model = Model.model_validate({"preset": "llama3_8b"})
    assert (model.num_layers, model.hidden_size, model.ffn_hidden_size) == (32, 4096, 14336)
    assert (model.num_attention_heads, model.num_query_groups) == (32, 8)
    assert (model.rotary_base, model.vocab_size) == (500_000, 128_256)
    assert model.untie_embeddings_and_output_weights


def test_every_preset_makes_a_model() -> None:
    for name in preset_names():
        assert Model.model_validate({"preset": name}).preset == name


def test_fields_given_beside_a_preset_override_it() -> None:
    model = Model.model_validate({"preset": "llama3_8b", "num_layers": 2})
    assert (model.num_layers, model.hidden_size) == (2, 4096)


def test_changing_a_preset_that_was_handed_out_changes_nothing() -> None:
    model_preset("demo")["num_layers"] = 99
    assert model_preset("demo")["num_layers"] == 4


def test_head_width_and_groups_have_defaults() -> None:
    model = Model(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    assert (model.kv_channels, model.num_query_groups) == (16, 4)
