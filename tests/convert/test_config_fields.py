"""Every field of every family's config class: read, refused by name, or known not to matter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_curr.convert.config_fields import HARMLESS, READ_FOR_ALL, class_fields
from megatron_curr.convert.family import Family
from megatron_curr.convert.hf_config import FAMILIES
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError, RecipeError
from tests.convert.test_families import build_toy
from tests.convert.test_import import change_config
from tests.convert.toy_models import TOYS, save_toy, toy_tokens

KNOWN = [family for family in FAMILIES if not family.defaults]
TOY_OF = {  # the first toy of a model type
    kind: name for name, (kind, _) in reversed(TOYS.items()) if name != "telechat2"
}
# Another value of every field that may change a result. A field that is not here takes the test
# below until somebody gives it one.
OTHER: dict[str, tuple[Any, ...]] = {
    "vocab_size": (260,),
    "hidden_size": (64,),
    "intermediate_size": (56,),
    "moe_intermediate_size": (16,),
    "num_hidden_layers": (3,),
    "num_attention_heads": (2,),
    "num_key_value_heads": (1, 4),
    "head_dim": (12,),
    "hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2", "silu", "quick_gelu"),
    "max_position_embeddings": (32,),
    "initializer_range": (0.3,),
    "rms_norm_eps": (0.01,),
    "layer_norm_eps": (0.01,),
    "tie_word_embeddings": (True, False),
    "attention_bias": (True, False),
    "mlp_bias": (True,),
    "use_parallel_residual": (True, False),
    "use_sliding_window": (True,),
    "sliding_window": (4, 64, None),
    "max_window_layers": (0, 1, 9),
    "layer_types": (
        ["full_attention", "sliding_attention"],
        ["full_attention"] * 2,
    ),
    "decoder_sparse_step": (2,),
    "mlp_only_layers": ([], [0]),
    "norm_topk_prob": (True, False),
    "num_experts": (8,),
    "num_local_experts": (8,),
    "n_routed_experts": (16,),
    "num_experts_per_tok": (1, 3, 4),
    "n_shared_experts": (2,),
    "n_group": (1, 2),
    "topk_group": (1, 4),
    "first_k_dense_replace": (0, 1),
    "routed_scaling_factor": (1.0, 3.0),
    "q_lora_rank": (12, None),
    "kv_lora_rank": (12,),
    "qk_nope_head_dim": (6,),
    "qk_rope_head_dim": (4,),
    "v_head_dim": (6,),
    "rope_interleave": (False,),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0},
        {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 3.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 2.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.5},
        {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            **{"mscale_all_dim": 0.7, "beta_fast": 8.0, "beta_slow": 0.5},
        },
        {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            **{"mscale": 0.4, "mscale_all_dim": 0.7},
        },
        {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            **{"attention_factor": 1.5, "truncate": True},
        },
        {
            **{"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            "truncate": False,
        },
    ),
}


def listed(family: Family) -> set[str]:
    return {*READ_FOR_ALL, *HARMLESS, *family.fields}


def of(family: Family) -> str:
    return family.model_type


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    for name in ("llama2", "gpt_neox"):
        save_toy(name, folder / name)
    return folder


@pytest.fixture
def llama(llamas: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llamas / "llama2", tmp_path / "llama")


@pytest.mark.parametrize("family", FAMILIES, ids=of)
def test_every_field_of_the_config_class_is_looked_at(family: Family) -> None:
    fields = class_fields(family)
    assert not fields.keys() - listed(family), (
        "read, fix or declare harmless what transformers brought"
    )
    assert all({**HARMLESS, **family.harmless}.values())
    assert not set(family.harmless) & {*family.names, *family.fixed, *family.reads}


@pytest.mark.parametrize("family", KNOWN, ids=of)
def test_an_absent_field_is_the_default_of_transformers(family: Family, tmp_path: Path) -> None:
    """Whatever our default is: the folder without the field is the folder that spells it out."""
    from megatron_curr.convert.hf_config import model_of, read_config

    def model(config: dict[str, Any]) -> Any:
        (tmp_path / "config.json").write_text(json.dumps(config))
        try:
            return model_of(read_config(tmp_path), family).model_dump()
        except CheckpointError as error:
            return str(error)

    fields = class_fields(family)
    bare = {"architectures": [family.architecture], "model_type": family.model_type}
    if fields.get("sliding_window"):  # a window that nobody wrote down is a window
        if "use_sliding_window" not in fields:
            assert f"sliding_window {fields['sliding_window']} is shorter" in model(bare)
        bare["sliding_window"] = None
    whole = model(bare)
    assert isinstance(whole, dict), whole
    for field, default in fields.items():
        if field not in {*HARMLESS, *bare} and default is not None:
            assert model({**bare, field: default}) == whole, field


def test_the_defaults_are_those_of_the_class_and_not_ours(tmp_path: Path) -> None:
    from megatron_curr.convert.hf_config import model_of, read_config

    def model(family: Family) -> Any:
        bare = {"architectures": [family.architecture], "sliding_window": None}
        (tmp_path / "config.json").write_text(json.dumps(bare))
        return model_of(read_config(tmp_path), family)

    models = {family.model_type: model(family) for family in KNOWN}
    assert models["qwen2"].layernorm_epsilon == 1e-6
    assert models["mistral"].num_query_groups == 8
    assert models["qwen3"].kv_channels == 128
    assert models["mixtral"].rotary_base == 1e6
    assert models["mixtral"].num_moe_experts == 8
    assert models["gpt_neox"].rotary_percent == 0.25
    assert models["deepseek_v3"].moe_router_topk_scaling_factor == 2.5
    assert models["deepseek_v3"].moe_router_num_groups == 8
    assert models["deepseek_v3"].moe_layers[:4] == (False, False, False, True)


def changed(family: Family) -> list[tuple[str, Any]]:
    fields = [name for name in class_fields(family) if name not in {*HARMLESS, *family.harmless}]
    known = TOYS[TOY_OF[family.model_type]][1]
    return [
        (name, value) for name in fields for value in OTHER[name] if value != known.get(name, ...)
    ]


@pytest.mark.parametrize("family", KNOWN, ids=of)
def test_another_value_is_refused_by_name_or_gives_equal_logits(
    family: Family, tmp_path: Path
) -> None:
    """transformers makes a model with every field changed in turn; both sides are compared."""
    from megatron_curr.parallel.groups import build_groups, destroy_groups, one_rank
    from tests.parallel.layouts import layout

    outcomes: list[bool] = []
    with one_rank():
        parallel = layout()
        groups = build_groups(parallel)
        try:
            for name, value in changed(family):
                if (theirs := their_model(family, name, value)) is not None:
                    shutil.rmtree(tmp_path)
                    theirs.save_pretrained(tmp_path)
                    said = {name, *(value if isinstance(value, dict) else ())}
                    outcomes.append(agrees(theirs, tmp_path, said, parallel, groups))
        finally:
            destroy_groups()
    assert min(outcomes.count(True), outcomes.count(False)) > 2, outcomes


def their_model(family: Family, name: str, value: Any) -> Any:
    """None where transformers has no such model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    _, fields = TOYS[TOY_OF[family.model_type]]
    try:
        config = AutoConfig.for_model(family.model_type, **{**fields, name: value})
        torch.manual_seed(1)
        theirs = AutoModelForCausalLM.from_config(config).eval()
        theirs(torch.zeros(1, 1, dtype=torch.long))
    except Exception:
        return None
    return theirs


@torch.no_grad()
def agrees(theirs: Any, folder: Path, said: set[str], parallel: Any, groups: Any) -> bool:
    """False where it is refused with one of these words."""
    from megatron_curr.convert.load import load_weights

    try:
        source = open_source(folder)
        source.family()
    except (CheckpointError, RecipeError) as refused:
        assert any(word in str(refused) for word in said), (said, str(refused))
        return False
    tokens_BS = toy_tokens()
    gpt = build_toy(source, parallel, groups)
    load_weights([gpt], source, groups=groups, vocab_size=source.vocab_size)
    ours = gpt(tokens_BS, torch.arange(tokens_BS.shape[1])[None], None)
    error = (ours[..., : source.vocab_size] - theirs(tokens_BS).logits).abs().max().item()
    assert error < 1e-5, (said, error)
    return True


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_type 'ntk'"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional'"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "factor 8.0"),
        ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 0.7}}, "mscale 0.7"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 1.1}},
            "attention_factor 1.1",
        ),
        ({"rope_parameters": {"rope_type": "default", "new_of_v6": 1}}, "new_of_v6 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_ratio": 500}, "rope_ratio is 500"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is [1, 0]"),
        ({"use_dynamic_ntk": True}, "use_dynamic_ntk is True"),
        (
            {
                "rope_scaling": {"type": "yarn", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
            },
            "make them equal",
        ),
        (
            {
                "original_max_position_embeddings": 32,
                "rope_scaling": {
                    **{"type": "yarn", "factor": 2.0},
                    "original_max_position_embeddings": 16,
                },
            },
            "original_max_position_embeddings is 32",
        ),
        (
            {
                "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e6},
                },
            },
            "differ from layer to layer",
        ),
        ({"is_causal": False}, "is_causal is False"),
        ({"per_layer_config": {"0": {"num_attention_heads": 2}}}, "per_layer_config"),
        ({"model_type": "mistral"}, "model_type is 'mistral'"),
    ],
)
def test_rotations_and_masks_that_are_not_ours_are_refused_without_comparing(
    llama: Path, tmp_path: Path, fields: dict[str, Any], told: str
) -> None:
    config = json.loads((llama / "config.json").read_text())
    if "rope_scaling" in fields:
        del config["rope_parameters"]
    (llama / "config.json").write_text(json.dumps({**config, **fields}))
    for verify in (None, False):
        with pytest.raises(CheckpointError) as refused:
            run_conversion(llama, tmp_path / "out", verify=verify)
        assert told in str(refused.value)


def test_a_field_that_a_later_transformers_brings_is_refused_unless_default(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_curr.convert import config_fields

    known = config_fields.class_fields

    def later(family: Family) -> dict[str, Any]:
        return {**known(family), "attention_sinks": False}

    monkeypatch.setattr(config_fields, "class_fields", later)
    change_config(llama, attention_sinks=False)
    open_source(llama)
    change_config(llama, attention_sinks=True)
    with pytest.raises(CheckpointError, match="attention_sinks is True"):
        open_source(llama)


def test_masks_and_rotations_among_the_weights_are_passed_over_whatever_their_dtype(
    llamas: Path, tmp_path: Path
) -> None:
    for dtype in (torch.uint8, torch.bool, torch.float16, torch.int64):
        for toy, home in (
            ("gpt_neox", "gpt_neox.layers.1.attention"),
            ("llama2", "model.layers.1.self_attn"),
        ):
            folder = shutil.copytree(llamas / toy, tmp_path / f"{toy}_{dtype}")
            path = folder / "model.safetensors"
            tensors = load_file(path) | {
                f"{home}.bias": torch.ones(1, 1, 64, 64).tril().to(dtype),
                f"{home}.masked_bias": torch.tensor(-1e4),
                f"{home}.rotary_emb.inv_freq": torch.ones(4),
                f"{home}.rotary_emb.cos_cached": torch.ones(64, 4).to(dtype),
            }
            save_file(tensors, path, metadata={"format": "pt"})
            done = run_conversion(folder, tmp_path / f"{toy}_{dtype}_out")
            assert done.agreement
            assert done.agreement.largest_logit_difference < 1e-5


def test_a_bias_that_is_no_mask_is_not_dropped(llama: Path, tmp_path: Path) -> None:
    path = llama / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.bias": torch.ones(32)}, path)
    with pytest.raises(CheckpointError, match=r"self_attn\.bias has no place"):
        open_source(llama)


def test_a_weight_of_integers_is_to_be_dequantised(llama: Path) -> None:
    path = llama / "model.safetensors"
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors = load_file(path)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, path)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)} is int8; .* dequantise it first"):
        open_source(llama)


def test_files_beside_the_weights_do_not_matter(llama: Path, tmp_path: Path) -> None:
    weights = open_source(llama).weights
    other = torch.zeros(3)
    torch.save({"other": other}, llama / "pytorch_model.bin")
    save_file({"other": other}, llama / "consolidated.00.safetensors")
    save_file({"other": other}, llama / "model.fp16.safetensors")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors"):
        index = {"weight_map": {"gone": f"{name}-00001-of-00009"}}
        (llama / f"{name}.index.json").write_text(json.dumps(index))
    (llama / "tf_model.h5").write_bytes(b"")
    (llama / "llama-q4.gguf").write_bytes(b"GGUF")
    for text in ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "cut sho"):
        (llama / "model.safetensors.index.json").write_text(text)
        again = open_source(llama).weights
        assert all(torch.equal(again.read(name), weights.read(name)) for name in weights.names())
