"""A video run in the release's layout and back: the same values by any way, from any layout."""

from __future__ import annotations

import json
from pathlib import Path

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from megatron_curr.cli import app
from megatron_curr.convert.mugv import model_of_shapes, mugv_pieces
from megatron_curr.convert.source import open_weights
from megatron_curr.convert.video import open_video_source
from megatron_curr.convert.video_first_weights import video_first_weights
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import load_recipe
from tests.ranks import run_ranks
from tests.training.tiny_video import video_recipe_values

LAYOUTS = {
    "one": {},
    "tp2pp2": {
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "pipeline_model_parallel_size": 2,
    },
}


def write_recipe(folder: Path, layout: str, **changes: object) -> Path:
    values = video_recipe_values(folder / "corpus", folder) | changes
    values["parallel"] |= LAYOUTS[layout]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return folder


def save(rank: int, folder: Path, kept: Path) -> None:
    """A run's one checkpoint; what it holds, whole, goes to ``kept``."""
    from megatron_curr.parallel.full_tensors import full_parameters
    from megatron_curr.parallel.groups import build_groups
    from megatron_curr.training.build import build_model
    from megatron_curr.training.checkpoint import Checkpointer
    from megatron_curr.training.checkpoint_folder import RunState
    from tests.models.videos import shake

    recipe = load_recipe(folder / "recipe.yaml")
    groups = build_groups(recipe.parallel)
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=0)
    average = full_parameters(chunks, groups)  # which starts as the weights do
    for chunk in chunks:
        shake(chunk, groups)
    state = RunState(
        consumed_tokens=0,
        step=1,
        optimizer_step=0,
        ledger_head="",
        recipe_fingerprint="",
        sources={},
        nonfinite_steps=0,
        nonfinite_in_a_row=0,
        keep=False,
        layout={},
        versions={},
    )
    report = Checkpointer(
        folder / "checkpoints",
        chunks=[chunk.module for chunk in chunks],
        optimizer=optimizer,
        pg_collection=groups.pg_collection,
        settings=recipe.checkpoint,
    ).save(state)
    assert report.error is None, report.error
    whole = {"raw": full_parameters(chunks, groups), "ema": average}
    if rank == 0:
        torch.save(whole, kept)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same weights, and what these are."""
    folder = tmp_path_factory.mktemp("video")
    for layout, num_ranks in (("one", 1), ("tp2pp2", 4)):
        run_ranks(save, num_ranks, write_recipe(folder / layout, layout), folder / f"{layout}.pt")
    return folder


def convert(*arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(app, ["convert", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def published(folder: Path, which: str) -> dict[str, Tensor]:
    """The released state dict of the weights that were saved, put together here."""
    ours = torch.load(folder / "one.pt")[which]
    model = load_recipe(folder / "one" / "recipe.yaml").model
    return {
        piece.published: torch.cat([ours[piece.stored][start:end] for start, end in piece.rows])
        for piece in mugv_pieces(model)
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["raw", "ema"])
def test_run_of_any_layout_becomes_the_released_file(
    folder: Path, tmp_path: Path, layout: str, which: str
) -> None:
    done = convert(folder / layout, tmp_path / "out", "--weights", which)
    found = torch.load(tmp_path / "out" / "dit.pt", weights_only=True)
    assert same(found, published(folder, which))
    assert done["num_parameters"] == sum(tensor.numel() for tensor in found.values())


def test_released_file_becomes_a_checkpoint_that_other_layouts_train_from(
    folder: Path, tmp_path: Path
) -> None:
    release = tmp_path / "dit.pt"
    torch.save({**published(folder, "raw"), "y_embedder.y_embedding": torch.zeros(3, 4)}, release)
    convert(release, tmp_path / "checkpoint")
    init_from = f"checkpoint:{tmp_path / 'checkpoint'}"
    write_recipe(tmp_path / "run", "tp2pp2", init_from=init_from)
    run_ranks(weights_are, 4, tmp_path / "run", folder / "one.pt")
    convert(tmp_path / "checkpoint", tmp_path / "again")
    found = torch.load(tmp_path / "again" / "dit.pt", weights_only=True)
    assert same(found, published(folder, "raw"))


def test_average_that_was_not_kept_is_refused(folder: Path, tmp_path: Path) -> None:
    convert(folder / "one", tmp_path / "hf", "--to", "hf")
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="holds no moving average of the weights; train with"):
        open_weights(tmp_path / "checkpoint", "ema")
    with pytest.raises(CheckpointError, match="is no run, so it has no average"):
        open_video_source(tmp_path / "checkpoint", which="ema")


def test_first_weights_may_be_the_average(folder: Path, tmp_path: Path) -> None:
    write_recipe(tmp_path / "run", "one", init_from=f"ema:{folder / 'tp2pp2'}")
    run_ranks(weights_are, 1, tmp_path / "run", folder / "one.pt", "ema")


def test_runs_are_averaged(folder: Path, tmp_path: Path) -> None:
    runs = [str(folder / layout) for layout in LAYOUTS]
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "out"), *runs, "--to", "checkpoint"])
    assert done.exit_code == 0, done.output
    convert(tmp_path / "out", tmp_path / "mugv")
    found = torch.load(tmp_path / "mugv" / "dit.pt", weights_only=True)
    assert same(found, published(folder, "raw"))
    (tmp_path / "text").mkdir()
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "no"), *runs, str(tmp_path / "text")])
    assert "is a video model and others are not" in str(done.exception)


def weights_are(rank: int, run: Path, kept: Path, which: str = "raw") -> None:
    from megatron_curr.models.video_dit import build_video_dit_chunks
    from megatron_curr.parallel.full_tensors import full_parameters
    from megatron_curr.parallel.groups import build_groups

    recipe = load_recipe(run / "recipe.yaml")
    groups = build_groups(recipe.parallel)
    chunks = build_video_dit_chunks(
        recipe.model, parallel=recipe.parallel, precision="fp32", groups=groups
    )
    fill = video_first_weights(recipe)
    assert fill is not None
    fill(chunks, groups)
    expected = torch.load(kept)[which]
    found = full_parameters(chunks, groups)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_safetensors_carry_a_config_and_go_back(folder: Path, tmp_path: Path) -> None:
    convert(folder / "one", tmp_path / "hf", "--to", "hf", "--dtype", "bf16")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    expected = {name: tensor.bfloat16() for name, tensor in published(folder, "raw").items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["MUGVDiT"] and config["max_text_tokens"] == 16
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    convert(tmp_path / "checkpoint", tmp_path / "again", "--to", "hf")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_sizes_are_read_off_the_released_shapes(folder: Path) -> None:
    model = load_recipe(folder / "one" / "recipe.yaml").model
    shapes = {piece.published: piece.shape for piece in mugv_pieces(model)}
    told = {"max_text_tokens", "init_method_std", "round_timesteps"}
    assert model_of_shapes(shapes).model_dump(exclude=told) == model.model_dump(exclude=told)
    assert model_of_shapes(shapes).round_timesteps


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("blocks.1.attn.qkv.bias"), "blocks.1.attn.qkv.bias is missing"),
        (lambda state: state.update(more=torch.zeros(1)), "more is not of MUGVDiT"),
        (
            lambda state: state.update({"t_block.1.bias": torch.zeros(7)}),
            "t_block.1.bias is (7,) and the other tensors ask for (288,)",
        ),
        (lambda state: state.pop("x_embedder.proj.weight"), "no state dict of MUG-V's transformer"),
    ],
)
def test_file_that_is_not_whole_is_refused(
    folder: Path, tmp_path: Path, damage: object, message: str
) -> None:
    state = published(folder, "raw")
    damage(state)
    torch.save(state, tmp_path / "dit.pt")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "dit.pt"), str(tmp_path / "out")])
    assert message in str(done.exception) + done.output
    assert not (tmp_path / "out").exists()
