"""Published models become checkpoints and first weights, or are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_curr.cli import main
from megatron_curr.convert.hf_config import FAMILIES
from megatron_curr.convert.refused import REFUSED
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError, RecipeError
from tests.convert.toy_models import save_toy

GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a tied Qwen 2."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("llama2", "qwen2", "mistral"):
        save_toy(name, folder / name)
        (folder / name / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def llama(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published / "llama2", tmp_path / "llama")


@pytest.fixture
def tied(published: Path, tmp_path: Path) -> Path:
    return shutil.copytree(published / "qwen2", tmp_path / "tied")


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder: Path) -> str:
    """The message; nothing is written beside the target either."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(CheckpointError) as caught:
        run_conversion(folder, folder.parent / "out", verify=False)
    assert sorted(folder.parent.iterdir()) == before
    told = str(caught.value)
    assert str(folder.parent) in told
    return told.replace(f"{folder}: ", "", 1)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_there_and_back_is_bit_exact_and_keeps_what_came_along(
    published: Path, tmp_path: Path, name: str
) -> None:
    there = run_conversion(published / name, tmp_path / "checkpoint")
    assert there.agreement is not None
    assert there.agreement.largest_logit_difference < 1e-5
    back = run_conversion(tmp_path / "checkpoint", tmp_path / "back", verify=True)
    assert back.architecture == there.architecture
    ours = load_file(tmp_path / "back" / "model.safetensors")
    theirs = load_file(published / name / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == 2


def test_files_of_torch_are_read_without_running_code(llama: Path, tmp_path: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(tensors, llama / "pytorch_model.bin")
    run_conversion(llama, tmp_path / "checkpoint", verify=False)
    torch.save({"a": tensors, "b": Path}, llama / "pytorch_model.bin")
    assert "--trust-pickle" in refusal(llama)


def test_a_missing_tensor_is_named(llama: Path) -> None:
    change_tensors(llama, lambda tensors: tensors.pop(GATE))
    assert refusal(llama).startswith(f"{GATE} is missing")


def test_an_extra_tensor_is_named(llama: Path) -> None:
    change_tensors(llama, lambda tensors: tensors.update(adapter=torch.ones(2)))
    assert refusal(llama).startswith(
        "adapter has no place in LlamaForCausalLM: refusing to drop it; rem"
    )


def test_a_wrong_shape_is_named(llama: Path) -> None:
    change_tensors(llama, lambda tensors: tensors.update({GATE: torch.ones(48, 31)}))
    assert refusal(llama) == (
        f"{GATE} is (48, 31) and config.json says (48, 32); take the config of these weights"
    )


def test_a_config_that_contradicts_the_weights_is_named(llama: Path) -> None:
    change_config(llama, num_hidden_layers=3)
    assert refusal(llama).startswith("model.layers.2.input_layernorm.weight is missing")
    change_config(llama, num_hidden_layers=1)
    assert "model.layers.1." in refusal(llama)
    change_config(llama, num_hidden_layers=2, intermediate_size=50)
    assert "(48, 32) and config.json says (50, 32)" in refusal(llama)


def test_tied_and_untied_mismatches_are_named(llama: Path, tied: Path) -> None:
    change_config(tied, tie_word_embeddings=False)
    assert "lm_head.weight is missing: config.json says tie_word_embeddings is false" in refusal(
        tied
    )
    change_config(llama, tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(llama)


def test_a_tied_folder_may_carry_a_copy(tied: Path, tmp_path: Path) -> None:
    table = "model.embed_tokens.weight"
    change_tensors(tied, lambda tensors: tensors.update({"lm_head.weight": tensors[table].clone()}))
    run_conversion(tied, tmp_path / "checkpoint", verify=False)


@pytest.mark.parametrize("kept", [4, 400, -100])
def test_a_truncated_file_is_named(llama: Path, kept: int) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert f"{path}: is no whole safetensors file" in refusal(llama)


def test_an_index_that_lists_what_is_not_there_is_told(llama: Path) -> None:
    index = llama / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {GATE: "model.safetensors", "gone": "b.safetensors"}})
    )
    missing = f"{llama / 'b.safetensors'}: is missing, and {index.name} lists it; download it"
    assert refusal(llama) == missing
    index.write_text(json.dumps({"weight_map": {"gone": "model.safetensors"}}))
    assert "lists gone in model.safetensors, where it is not" in refusal(llama)


def test_an_unknown_architecture_lists_the_known(llama: Path) -> None:
    change_config(llama, architectures=["BertModel"])
    message = refusal(llama)
    assert "BertModel is unknown" in message
    assert all(family.architecture in message for family in FAMILIES)


@pytest.mark.parametrize("architecture", sorted(REFUSED))
def test_a_family_that_cannot_be_exact_is_refused_with_the_reason(
    llama: Path, architecture: str
) -> None:
    change_config(llama, architectures=[architecture])
    assert f"{architecture} cannot be represented exactly: {REFUSED[architecture]}" in refusal(
        llama
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0 and rope_parameters.rope_theta 10000.0"),
        (
            {
                "rope_parameters": {
                    **{"rope_type": "llama3", "factor": 2.0, "rope_theta": 1e4},
                    **{"low_freq_factor": 2.0, "high_freq_factor": 4.0},
                    "original_max_position_embeddings": 8192,
                }
            },
            "low_freq_factor of the rotations is 2.0; megatron-core has Llama 3.1's alone",
        ),
        ({"quantization_config": {}}, "dequantise"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
)
def test_a_config_that_the_table_does_not_cover_is_named(
    llama: Path, fields: dict[str, Any], told: str
) -> None:
    change_config(llama, **fields)
    assert told in refusal(llama)


def test_a_window_comes_along_unless_no_text_is_longer(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published / "mistral", tmp_path / "mistral")
    assert open_source(folder).model.window_size == 5
    change_config(folder, max_position_embeddings=5)
    assert open_source(folder).model.window_size is None


def test_a_target_with_content_is_kept(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    assert "is not an empty folder" in refusal(llama)


def test_the_architecture_may_be_named_where_several_fit(llama: Path, tmp_path: Path) -> None:
    done = run_conversion(
        llama, tmp_path / "hf", to="hf", architecture="MistralForCausalLM", verify=False
    )
    assert done.architecture == "MistralForCausalLM"
    assert "not compared" in done.verdict or done.agreement is None
    with pytest.raises(RecipeError, match="Qwen3ForCausalLM: qk_layernorm is False, there True"):
        run_conversion(llama, tmp_path / "other", to="hf", architecture="Qwen3ForCausalLM")


def test_a_damaged_converted_checkpoint_is_named(llama: Path, tmp_path: Path) -> None:
    run_conversion(llama, tmp_path / "checkpoint", verify=False)
    with pytest.raises(CheckpointError, match=r"model\.yaml: is damaged"):
        (tmp_path / "checkpoint" / "model.yaml").write_text("model: 3\n")
        open_source(tmp_path / "checkpoint")


def test_the_command_tells_the_outcome_and_wrong_input(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(llama), str(tmp_path / "out"), "--no-verify", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["architecture"] == "LlamaForCausalLM"
    assert told["verdict"] == "not compared: --no-verify"
    assert main(["convert", str(llama), str(tmp_path / "out")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "m"), str(tmp_path / "out"), str(llama)]) == 0
    assert "not compared: there is no second model, it is the average of" in capsys.readouterr().out
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert main(["merge", str(tmp_path / "n"), str(llama), "--method", "linear"]) == 2
