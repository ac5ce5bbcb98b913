"""Arithmetic on checkpoints is that of their tensors."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.convert import PeakMemory
from megatron_curr.convert.export import export
from megatron_curr.convert.merge import Method, merge
from megatron_curr.convert.run_conversion import convert_source, run_conversion
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError, RecipeError
from tests.convert.toy_models import save_toy

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three Llamas of one shape; the second as a checkpoint."""
    folder = tmp_path_factory.mktemp("three")
    save_toy("llama2", folder / "0")
    for number in (1, 2):
        (folder / str(number)).mkdir()
        config = (folder / "0" / "config.json").read_text()
        (folder / str(number) / "config.json").write_text(config)
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(folder / "0" / "model.safetensors")
        moved = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            for name, tensor in tensors.items()
        }
        save_file(moved, folder / str(number) / "model.safetensors", metadata={"format": "pt"})
    run_conversion(folder / "1", folder / "checkpoint", verify=False)
    return [folder / "0", folder / "checkpoint", folder / "2"]


def tensors_of(paths: list[Path]) -> list[Tensors]:
    folder = paths[0].parent
    return [load_file(folder / name / "model.safetensors") for name in ("0", "1", "2")]


def merged(paths: list[Path], output: Path, *, method: Method, by: float | None = None) -> Tensors:
    sources = [open_source(path) for path in paths]
    convert_source(merge(sources, method=method, by=by), output, to="hf")
    return load_file(output / "model.safetensors")


def test_average_linear_and_residual(three: list[Path], tmp_path: Path) -> None:
    a, b, c = tensors_of(three)
    average = merged(three, tmp_path / "average", method="average")
    linear = merged(three[:2], tmp_path / "linear", method="linear", by=0.25)
    residual = merged(three, tmp_path / "residual", method="residual", by=0.5)
    for name in a:
        torch.testing.assert_close(average[name], (a[name] + b[name] + c[name]) / 3)
        torch.testing.assert_close(linear[name], 0.75 * a[name] + 0.25 * b[name])
        torch.testing.assert_close(residual[name], a[name] + 0.5 * (b[name] - c[name]))


def test_spherical_keeps_to_the_arc(three: list[Path], tmp_path: Path) -> None:
    a, b, _ = tensors_of(three)
    middle = merged(three[:2], tmp_path / "middle", method="spherical", by=0.5)
    name = "model.layers.0.mlp.down_proj.weight"
    first, second, found = (x[name].double().flatten() for x in (a, b, middle))

    def angle(x: Tensor, y: Tensor) -> float:
        return float(torch.acos(x @ y / x.norm() / y.norm()))

    assert angle(first, found) + angle(found, second) == pytest.approx(angle(first, second), 1e-4)
    assert found.norm() > 1.01 * ((first + second) / 2).norm()
    whole = merged(three[:2], tmp_path / "whole", method="spherical", by=1.0)
    torch.testing.assert_close(whole[name], b[name])


def test_a_merge_may_be_a_checkpoint_and_says_what_it_is(three: list[Path], tmp_path: Path) -> None:
    source = merge([open_source(path) for path in three], method="average")
    done = convert_source(source, tmp_path / "checkpoint", to="checkpoint")
    assert "there is no second model, it is the average of" in done.verdict
    again = open_source(tmp_path / "checkpoint")
    export(again, tmp_path / "hf")
    direct = merged(three, tmp_path / "direct", method="average")
    ours = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(ours[name], direct[name]) for name in direct)


@pytest.mark.parametrize("to", ["hf", "checkpoint"])
def test_memory_is_that_of_blocks_and_not_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Literal["hf", "checkpoint"]
) -> None:
    monkeypatch.setattr("megatron_curr.convert.files_out.BLOCK_BYTES", 1 << 20)
    monkeypatch.setattr("megatron_curr.convert.merge._VALUES_AT_ONCE", 1 << 18)
    save_toy("qwen2", tmp_path / "big")
    tensors = load_file(tmp_path / "big" / "model.safetensors")
    table = torch.ones(1 << 20, 32)
    tensors["model.embed_tokens.weight"] = table
    save_file(tensors, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "big" / "config.json").read_text())
    (tmp_path / "big" / "config.json").write_text(json.dumps(config | {"vocab_size": len(table)}))
    weight_bytes = table.nbytes
    del tensors, table

    copies = [tmp_path / "big", tmp_path / "second", tmp_path / "third"]
    for copy in copies[1:]:
        shutil.copytree(copies[0], copy, copy_function=os.link)
    source = merge([open_source(path) for path in copies], method="average")
    with PeakMemory() as memory:
        convert_source(source, tmp_path / "out", to=to, verify=False)
    assert memory.most - memory.first < weight_bytes / 3
    found = open_source(tmp_path / "out").weights.read("embedding.word_embeddings.weight")
    assert found.shape == (1 << 20, 32) and bool((found == 1).all())


def test_average_refuses_how_far_to_go(three: list[Path]) -> None:
    with pytest.raises(RecipeError, match=r"--by 0.3: an average takes all alike"):
        merge([open_source(path) for path in three], method="average", by=0.3)


def test_model_is_not_merged_with_itself(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(three[0])
    for method in ("average", "linear", "spherical"):
        with pytest.raises(RecipeError, match="link: given twice"):
            merge([open_source(three[0]), open_source(tmp_path / "link")], method=method)


def test_other_numbers_and_other_models_are_refused(three: list[Path], tmp_path: Path) -> None:
    sources = [open_source(path) for path in three]
    with pytest.raises(RecipeError, match="linear: takes 2 sources, 3 are given"):
        merge(sources, method="linear", by=0.5)
    with pytest.raises(RecipeError, match="takes two or more sources, 1 are given"):
        merge(sources[:1], method="average")
    save_toy("mistral", tmp_path / "mistral")
    with pytest.raises(CheckpointError, match="num_query_groups is 2 and in"):
        merge([sources[0], open_source(tmp_path / "mistral")], method="average")
