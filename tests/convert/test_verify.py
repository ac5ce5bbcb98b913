"""What was rounded on the way is told from what was converted wrongly, in both directions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.convert.verify import compare, verify
from megatron_curr.errors import CheckpointError
from tests.convert.toy_models import save_toy

DOWN = "model.layers.2.mlp.experts.{}.down_proj.weight"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys in fp32."""
    folder = tmp_path_factory.mktemp("published")
    for name in ("llama2", "qwen3_moe", "deepseek_v3"):
        save_toy(name, folder / name)
    return folder


def swap_experts(tensors: dict[str, Tensor]) -> None:
    first, second = DOWN.format(0), DOWN.format(1)
    tensors[first], tensors[second] = tensors[second], tensors[first]


def scale_one_key(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight"].mul_(1.01)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["llama2", "qwen3_moe"])
def test_rounding_is_allowed_for_there_and_back(
    published: Path, tmp_path: Path, name: str, dtype: str
) -> None:
    there = run_conversion(published / name, tmp_path / "rounded", dtype=dtype, verify=True)
    run_conversion(published / name, tmp_path / "exact", verify=False)
    back = run_conversion(tmp_path / "exact", tmp_path / "hf", dtype=dtype, verify=True)
    for found in (there.agreement, back.agreement):
        assert found is not None and found.rounded_alike is not None
        assert found.tolerance == {"bf16": 0.25, "fp16": 0.05}[dtype]
        assert found.largest_logit_difference > 1e-4  # it was rounded
        assert found.rounded_alike.largest_logit_difference < 1e-5
        assert "both rounded alike, by" in str(found)


@pytest.mark.parametrize(
    ("name", "change"), [("qwen3_moe", swap_experts), ("llama2", scale_one_key)]
)
def test_what_rounding_would_cover_is_seen(
    published: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Tensor]], None]
) -> None:
    run_conversion(published / name, tmp_path / "checkpoint", dtype="bf16", verify=False)
    broken = shutil.copytree(published / name, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    change(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    source = open_source(published / name)
    assert compare(published / name, tmp_path / "checkpoint", source).is_close
    with pytest.raises(CheckpointError, match=r"is not the model of .*--no-verify"):
        verify(broken, tmp_path / "checkpoint", source)


def test_experts_that_switch_by_rounding_are_told(published: Path, tmp_path: Path) -> None:
    """A router whose scores are near a tie takes other experts once it is rounded."""
    folder = shutil.copytree(published / "qwen3_moe", tmp_path / "near_ties")
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if name.endswith("mlp.gate.weight"):
            weight.copy_(0.9 * weight[:1] + 0.1 * weight)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = run_conversion(folder, tmp_path / "checkpoint", dtype="bf16", verify=True).agreement
    assert found is not None and found.rounded_alike is not None
    assert found.largest_logit_difference > found.tolerance
    assert found.beyond_frac > 0
    assert f"{found.beyond_frac:.2%} of tokens differ by more, which take other" in str(found)
    assert found.rounded_alike.beyond_frac == 0


def test_a_model_type_of_its_own_is_compared_through_its_architecture(
    published: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(published / "deepseek_v3", tmp_path / "kimi")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "kimi_k2"}))
    found = run_conversion(folder, tmp_path / "checkpoint").agreement
    assert found is not None
    assert found.largest_logit_difference < 1e-4


def test_what_transformers_cannot_load_is_a_sentence(published: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(published / "llama2", tmp_path / "llama")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 10**6}))
    with pytest.raises(CheckpointError, match=r"transformers .* cannot load it as Llama.*--no-ver"):
        run_conversion(folder, tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    assert run_conversion(folder, tmp_path / "checkpoint", verify=False).agreement is None
    assert torch.equal(
        open_source(folder).weights.read("embedding.word_embeddings.weight"),
        open_source(tmp_path / "checkpoint").weights.read("embedding.word_embeddings.weight"),
    )
