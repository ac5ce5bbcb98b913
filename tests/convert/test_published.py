"""What of a folder are its weights: not masks, not rotary tables, not the files beside them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError
from tests.convert.toy_models import save_toy


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    for name in ("llama2", "gpt_neox"):
        save_toy(name, folder / name)
    return folder


@pytest.fixture
def llama(llamas: Path, tmp_path: Path) -> Path:
    return shutil.copytree(llamas / "llama2", tmp_path / "llama")


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
