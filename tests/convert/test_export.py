"""Exported models equal the checkpoint's, whatever layout saved it; bad input is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megatron_curr.convert.export import choose_family, export_run
from megatron_curr.convert.stored import open_stored
from megatron_curr.convert.verify import verify_export
from megatron_curr.errors import CheckpointError, DataError, RecipeError, UserError
from megatron_curr.recipe.load import load_recipe
from tests.convert.saved_runs import VOCAB_SIZE, save_run, write_corpus

MODELS = {
    "llama_tied": {"untie_embeddings_and_output_weights": False},
    "llama_untied": {"rotary_base": 500_000.0, "kv_channels": 16},
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True, "kv_channels": 16},
}
ARCHITECTURES = {
    "llama_tied": "LlamaForCausalLM",
    "llama_untied": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def plain_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_run(corpus, tmp_path_factory.mktemp("runs") / "plain")


@pytest.fixture
def own_run(plain_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain_run, tmp_path / "run")


@pytest.mark.parametrize(
    ("name", "tp", "pp"),
    [
        *((name, 2, 1) for name in MODELS),
        ("llama_tied", 1, 1),
        ("llama_tied", 1, 2),
        ("qwen3", 1, 2),
    ],
)
def test_logits_equal_the_checkpoints(
    corpus: Path, tmp_path: Path, name: str, tp: int, pp: int
) -> None:
    run = save_run(corpus, tmp_path / "run", tp=tp, pp=pp, **MODELS[name])
    export = export_run(run, tmp_path / "hf")
    assert export.architecture == ARCHITECTURES[name]
    agreement = verify_export(tmp_path / "hf", run)
    assert agreement.largest_logit_difference < 1e-5
    assert agreement.same_next_token_frac == 1.0
    assert agreement.num_tokens >= 256


def test_a_changed_weight_is_seen(plain_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export_run(plain_run, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.k_proj.weight"].mul_(1.5)
    save_file(tensors, file, metadata={"format": "pt"})
    assert not verify_export(tmp_path / "hf", plain_run).is_close


def test_shards_hold_the_same_tensors_as_one_file(plain_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_run(plain_run, tmp_path / "one")
    export_run(plain_run, tmp_path / "many", max_shard_bytes=20_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    assert whole["model.embed_tokens.weight"].shape[0] == VOCAB_SIZE
    assert verify_export(tmp_path / "many", plain_run).largest_logit_difference < 1e-5


def test_bf16_is_the_rounded_fp32(plain_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_run(plain_run, tmp_path / "fp32")
    export_run(plain_run, tmp_path / "bf16", dtype="bf16")
    exact = load_file(tmp_path / "fp32" / "model.safetensors")
    rounded = load_file(tmp_path / "bf16" / "model.safetensors")
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in exact)
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_a_bf16_run_exports_as_it_is_stored(corpus: Path, tmp_path: Path) -> None:
    run = save_run(corpus, tmp_path / "run", precision="bf16")
    assert export_run(run, tmp_path / "hf").dtype == "bfloat16"
    assert verify_export(tmp_path / "hf", run).largest_logit_difference < 1e-5


def test_config_serves_transformers_4_and_5(plain_run: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    export_run(plain_run, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 10_000.0
    assert raw["torch_dtype"] == raw["dtype"] == "float32"
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert config.num_key_value_heads == 2
    assert config.vocab_size == VOCAB_SIZE
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_generation_stops_at_the_end_token(plain_run: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_run(plain_run, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert tokenizer.eos_token_id == model.generation_config.eos_token_id == 2
    inputs = tokenizer("a tensor", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] > 2


def test_model_card_tells_the_run(plain_run: Path, tmp_path: Path) -> None:
    export_run(plain_run, tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| prose | 4,096 | 100.0% | 0.51 | 4.250 |" in card
    assert "| short | 4,096 | 32 | 256 | 0 → 0.003 | prose 100.0% |" in card
    assert "| mixed |" not in card  # the checkpoint has not reached it
    assert "4,096 tokens of the 8,192" in card
    assert "AutoModelForCausalLM" in card
    assert "gradients clipped at 1.0" in card


def test_a_target_with_content_is_refused_and_kept(plain_run: Path, tmp_path: Path) -> None:
    target = tmp_path / "hf"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_run(plain_run, target)
    assert [path.name for path in tmp_path.rglob("*")] == ["hf", "mine.txt"]


def test_an_empty_target_is_filled(plain_run: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    export_run(plain_run, tmp_path / "hf")
    assert (tmp_path / "hf" / "config.json").is_file()


def test_one_checkpoint_may_be_named(plain_run: Path, tmp_path: Path) -> None:
    checkpoint = plain_run / "checkpoints" / "step_00000016"
    assert export_run(checkpoint, tmp_path / "hf").checkpoint == checkpoint


def test_a_torn_checkpoint_is_passed_over_or_refused(own_run: Path, tmp_path: Path) -> None:
    whole = own_run / "checkpoints" / "step_00000016"
    torn = shutil.copytree(whole, whole.with_name("step_00000017"))
    file = next(torn.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    export = export_run(own_run, tmp_path / "hf")
    assert export.checkpoint == whole
    assert "step_00000017" in export.passed_over[0]
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        export_run(torn, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers: 4": "num_layers: 5"}, "has 4 layers and the recipe 5"),
        ({"num_layers: 4": "num_layers: 3"}, "has 4 layers and the recipe 3"),
        ({"num_layers: 4": "num_layers: 4\n  qk_layernorm: true"}, "q_layernorm.*missing"),
        ({"hidden_size: 32": "hidden_size: 64"}, "is 32 wide and the recipe 64"),
        ({"ffn_hidden_size: 64": "ffn_hidden_size: 65"}, "has 128 rows and the recipe 130"),
        ({"ffn_hidden_size: 64": "ffn_hidden_size: 63"}, "has 128 rows and the recipe 126"),
        (
            {"num_layers: 4": "num_layers: 4\n  untie_embeddings_and_output_weights: false"},
            "output_layer.weight has no place",
        ),
    ],
)
def test_a_recipe_of_another_model_is_named(
    own_run: Path, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    recipe = own_run / "recipe.yaml"
    text = recipe.read_text()
    for old, new in change.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        export_run(own_run, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


def test_a_model_without_an_architecture_is_refused(own_run: Path, tmp_path: Path) -> None:
    recipe = own_run / "recipe.yaml"
    both = "num_layers: 4\n  qk_layernorm: true\n  add_qkv_bias: true"
    recipe.write_text(recipe.read_text().replace("num_layers: 4", both))
    with pytest.raises(RecipeError, match="no Hugging Face architecture"):
        export_run(own_run, tmp_path / "hf")


def test_a_model_with_experts_is_refused(own_run: Path) -> None:
    model = load_recipe(own_run / "recipe.yaml").model.model_copy(update={"num_moe_experts": 4})
    with pytest.raises(RecipeError, match="num_moe_experts=4: there is no table"):
        choose_family(model)


def test_an_unknown_dtype_is_refused(plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="fp32, bf16"):
        export_run(plain_run, tmp_path / "hf", dtype="fp8")


@pytest.mark.parametrize("place", ["nowhere", "empty"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="give a"):
        export_run(tmp_path / place, tmp_path / "hf")


def test_a_missing_tokenizer_is_refused_and_leaves_nothing(own_run: Path, tmp_path: Path) -> None:
    recipe = own_run / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("tokenizer.model", "gone.model"))
    with pytest.raises(DataError, match=r"gone\.model"):
        export_run(own_run, tmp_path / "hf")
    assert not list(tmp_path.glob("*hf*"))


class _Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("code ran",))


def test_foreign_pickles_do_not_run(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = own_run / "checkpoints" / "step_00000016"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Trap()))
    with pytest.raises(CheckpointError, match=r"print is not part of a checkpoint"):
        open_stored(checkpoint)
    assert "code ran" not in capsys.readouterr().out


def test_a_chunk_with_other_bytes_is_named(own_run: Path) -> None:
    checkpoint = own_run / "checkpoints" / "step_00000016"
    stored = open_stored(checkpoint)
    chunk = stored["decoder.final_layernorm.weight"].chunks[0]
    path = checkpoint / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.first_byte : chunk.first_byte + chunk.num_bytes] = bytes(chunk.num_bytes)
    path.write_bytes(data)
    with pytest.raises(UserError, match="final_layernorm"):
        stored.read("decoder.final_layernorm.weight")
