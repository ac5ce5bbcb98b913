"""Every field of every family's config class: read, refused by name, or known not to matter."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_curr.convert.config_fields import HARMLESS, READ_FOR_ALL, class_fields
from megatron_curr.convert.family import Family
from megatron_curr.convert.hf_config import FAMILIES
from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError, RecipeError
from tests.convert.other_values import OTHER
from tests.convert.test_families import build_toy
from tests.convert.test_import import change_config
from tests.convert.toy_models import TOYS, save_toy, toy_tokens

KNOWN = [family for family in FAMILIES if not family.defaults]
TOY_OF = {  # the first toy of a model type
    kind: name for name, (kind, _) in reversed(TOYS.items()) if name != "telechat2"
}


def listed(family: Family) -> set[str]:
    return {*READ_FOR_ALL, *HARMLESS, *family.fields}


def of(family: Family) -> str:
    return family.model_type


def required(family: Family) -> dict[str, Any]:
    """What the table asks for and the class's default is not."""
    fields = class_fields(family)
    wanted = {name: values[0] for name, values in family.fixed.items() if name in fields}
    needed = {name: value for name, value in wanted.items() if fields[name] != value}
    # Half of its default head is no even number of dims.
    return needed | ({"head_dim": 128} if family.model_type == "glm4_moe" else {})


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields")
    for name in ("llama2", "telechat2"):
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
    bare |= required(family)
    whole = model(bare)
    assert isinstance(whole, dict), whole
    for field, default in fields.items():
        if field not in {*HARMLESS, *bare} and default is not None:
            assert model({**bare, field: default}) == whole, field


def test_the_defaults_are_those_of_the_class_and_not_ours(tmp_path: Path) -> None:
    from megatron_curr.convert.hf_config import model_of, read_config

    def model(family: Family) -> Any:
        bare = {"architectures": [family.architecture], **required(family)}
        (tmp_path / "config.json").write_text(json.dumps(bare))
        return model_of(read_config(tmp_path), family)

    models = {family.model_type: model(family) for family in KNOWN}
    assert models["qwen2"].layernorm_epsilon == 1e-6
    assert models["mistral"].num_query_groups == 8
    assert models["qwen3"].kv_channels == 128
    assert models["mistral"].window_size == 4096
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
        config = AutoConfig.for_model(family.model_type, **copy.deepcopy({**fields, name: value}))
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


def test_rotations_of_an_architecture_that_transformers_has_not_are_read(
    llamas: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llamas / "telechat2", tmp_path / "telechat2")
    assert open_source(folder).model.rotary_base == 10_000.0
    change_config(folder, rope_theta=5e5)
    assert open_source(folder).model.rotary_base == 5e5
    for scaling in ({"type": "dynamic", "factor": 2.0}, {"type": "linear", "factor": 2.0}):
        change_config(folder, rope_scaling=scaling)
        with pytest.raises(CheckpointError, match=f"rope_type '{scaling['type']}'"):
            open_source(folder)


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
