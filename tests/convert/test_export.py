"""Exported models equal the checkpoint's, whatever layout saved it; bad input is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_curr.cli import main
from megatron_curr.convert.export import Export, export
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.convert.stored import open_stored
from megatron_curr.convert.verify import compare, verify
from megatron_curr.data.shards import open_shards
from megatron_curr.errors import CheckpointError, DataError, RecipeError, UserError
from tests.convert.saved_runs import VOCAB_SIZE, save_run, write_corpus


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


def export_run(run: Path, output: Path, **options: Any) -> Export:
    return export(open_source(run), output, **options)


def largest_difference(folder: Path, run: Path) -> float:
    source = open_source(run)
    return compare(folder, source.path, source).largest_logit_difference


@pytest.mark.parametrize(
    ("architecture", "tp", "pp", "model"),
    [
        ("Qwen3ForCausalLM", 2, 2, {"qk_layernorm": True, "kv_channels": 16}),
        ("MixtralForCausalLM", 2, 1, {"num_moe_experts": 4, "moe_ffn_hidden_size": 24}),
    ],
)
def test_logits_equal_those_of_a_real_save(
    corpus: Path, tmp_path: Path, architecture: str, tp: int, pp: int, model: dict[str, Any]
) -> None:
    run = save_run(corpus, tmp_path / "run", tp=tp, pp=pp, **model)
    done = run_conversion(run, tmp_path / "hf", verify=True)
    assert done.architecture == architecture
    assert done.agreement is not None
    assert done.agreement.largest_logit_difference < 1e-5
    assert done.agreement.same_next_token_frac == 1.0
    assert done.agreement.num_tokens >= 256
    assert done.agreement.perplexity == pytest.approx(done.agreement.perplexity_of_ours)


def test_a_changed_weight_is_seen(plain_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    export_run(plain_run, tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.k_proj.weight"].mul_(1.5)
    save_file(tensors, file, metadata={"format": "pt"})
    source = open_source(plain_run)
    assert not compare(tmp_path / "hf", source.path, source).is_close
    with pytest.raises(CheckpointError, match="is not the model of"):
        verify(tmp_path / "hf", source.path, source)


def test_a_conversion_that_is_not_the_model_leaves_nothing(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_curr.convert.verify.SAME_BITS", -1.0)
    with pytest.raises(CheckpointError, match=r"next token the same in 100\.00%"):
        run_conversion(plain_run, tmp_path / "hf", verify=True)
    assert not list(tmp_path.iterdir())


def test_a_killed_conversion_goes_on_where_it_was(
    plain_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def stop(count: int) -> None:
        written.append(count)
        if len(written) == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_run(plain_run, tmp_path / "hf", max_file_bytes=20_000, on_bytes=stop)
    whole = sorted((tmp_path / ".hf.partial").glob("model-*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in whole]
    assert whole
    export_run(plain_run, tmp_path / "hf", max_file_bytes=20_000)
    assert [(tmp_path / "hf" / path.name).stat().st_mtime_ns for path in whole] == stamps
    assert largest_difference(tmp_path / "hf", plain_run) < 1e-5
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_shards_hold_the_same_tensors_as_one_file(plain_run: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    export_run(plain_run, tmp_path / "one")
    export_run(plain_run, tmp_path / "many", max_file_bytes=20_000)
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in whole.values())
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])
    assert whole["model.embed_tokens.weight"].shape[0] == VOCAB_SIZE
    assert largest_difference(tmp_path / "many", plain_run) < 1e-5


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
    assert largest_difference(tmp_path / "hf", run) < 1e-5


def test_the_moving_average_is_exported_where_asked_for(corpus: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    run = save_run(corpus, tmp_path / "run", tp=2, ema_decay=0.9)
    for which in ("raw", "ema"):
        assert main(["convert", str(run), str(tmp_path / which), "--weights", which]) == 0
    raw, average = (load_file(tmp_path / which / "model.safetensors") for which in ("raw", "ema"))
    assert raw.keys() == average.keys()
    for name, found in average.items():  # it is what the weights were before vectors were moved
        if found.dim() == 1:
            assert not torch.equal(found, raw[name])
            assert torch.equal(found, torch.ones_like(found))
        else:
            assert torch.equal(found, raw[name])
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "moving average of the trained weights" in card


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


def test_a_chat_template_is_published_for_versions_4_and_5(plain_run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    export_run(plain_run, tmp_path / "hf", chat_template=template)
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == (tmp_path / "hf" / "chat_template.jinja").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "user: hi\n"
    template.write_text("{% for %}")
    with pytest.raises(DataError, match="is no chat template"):
        export_run(plain_run, tmp_path / "other", chat_template=template)
    assert not (tmp_path / "other").exists()


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
    assert export_run(checkpoint, tmp_path / "hf").source == checkpoint


def test_every_checkpoint_of_a_run_is_converted_once(
    own_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = next((own_run / "checkpoints").glob("step_*"))
    torn = shutil.copytree(whole, whole.with_name("step_00000017"))
    next(torn.glob("*.distcp")).write_bytes(b"")
    shutil.copytree(whole, whole.with_name("step_00000018"))
    output = tmp_path / "all"
    command = ["convert", str(own_run), str(output), "--every-checkpoint", "--no-verify"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "step_00000017" in told and "the other checkpoints are converted" in told
    assert sorted(path.name for path in output.iterdir()) == [whole.name, "step_00000018"]
    made = (output / whole.name / "model.safetensors").stat().st_mtime_ns
    shutil.rmtree(torn)
    shutil.copytree(whole, torn)
    assert main(command) == 0
    assert (output / "step_00000017" / "config.json").is_file()
    assert (output / whole.name / "model.safetensors").stat().st_mtime_ns == made
    capsys.readouterr()
    assert main(command) == 0
    assert "every checkpoint is there" in capsys.readouterr().out
    assert main(["convert", str(tmp_path), str(output), "--every-checkpoint"]) == 2
    assert main(["convert", str(own_run), str(output), "--slurm-array", "2"]) == 2


def test_a_torn_checkpoint_is_passed_over_or_refused(own_run: Path, tmp_path: Path) -> None:
    whole = own_run / "checkpoints" / "step_00000016"
    torn = shutil.copytree(whole, whole.with_name("step_00000017"))
    file = next(torn.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-100])
    done = run_conversion(own_run, tmp_path / "hf", verify=False)
    assert done.source == whole
    assert "step_00000017" in done.passed_over[0]
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


def test_an_unknown_dtype_is_refused(plain_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="fp32, bf16, fp16"):
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
    chunk = stored.tensors["decoder.final_layernorm.weight"].chunks[0]
    path = checkpoint / chunk.file
    data = bytearray(path.read_bytes())
    data[chunk.first_byte : chunk.first_byte + chunk.num_bytes] = bytes(chunk.num_bytes)
    path.write_bytes(data)
    with pytest.raises(UserError, match="final_layernorm"):
        stored.read("decoder.final_layernorm.weight")


def test_documents_that_begin_with_a_bos_are_read_so(own_run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    recipe = yaml.safe_load((own_run / "recipe.yaml").read_text())
    tokenizer = recipe["data"]["tokenizer"]
    text = Path(tokenizer).with_name("text.jsonl")
    command = ["preprocess", str(text), "--tokenizer", tokenizer, "--workers", "1"]
    assert main([*command, "--output", str(tmp_path / "shards"), "--bos", "yes"]) == 0
    for source in recipe["data"]["sources"].values():
        source["shards"] = str(tmp_path / "shards" / "train")
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert export_run(own_run, tmp_path / "hf").notes == ()
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("a tensor").input_ids
    shards = open_shards(tmp_path / "shards" / "train")
    assert ids[0] == shards.read(0, 1)[0] == 1
    assert 1 not in ids[1:]
    assert "and began with `<s>`" in (tmp_path / "hf" / "README.md").read_text()
