from __future__ import annotations

import dataclasses
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
import yaml

from megatron_curr.cli import main
from megatron_curr.data.codecs import HaarCodec
from megatron_curr.data.text_features import HashedSubwords
from megatron_curr.data.video_manifest import VideoManifest
from megatron_curr.errors import DataError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.sample.encoders import manifest_of, open_encoders
from megatron_curr.sample.run import last_timestep_shift
from megatron_curr.sample.wish import Wish
from megatron_curr.training.checkpoint_folder import STATE, RunState, write_manifest
from tests.data.video_folders import write_drawn_folder
from tests.training.tiny import recipe_values
from tests.training.tiny_video import video_recipe_values


def saved_run(folder: Path, values: dict[str, Any]) -> Path:
    """A run with one whole checkpoint, of one tensor."""
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    with warnings.catch_warnings(action="ignore"):  # that there is one process
        torch_checkpoint.save({"bias": torch.ones(2)}, checkpoint_id=checkpoint, no_dist=True)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.storage_meta = None  # a path, which megatron-core leaves out
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    counts = dict.fromkeys(
        ("consumed_tokens", "step", "optimizer_step", "nonfinite_steps", "nonfinite_in_a_row"), 1
    )
    state = RunState(
        **counts, ledger_head="", recipe_fingerprint="", sources={}, keep=False, layout={},
        versions={},
    )  # fmt: skip
    (checkpoint / STATE).write_text(state.to_json())
    write_manifest(checkpoint, {})
    return folder


@pytest.mark.parametrize(
    ("kind", "place", "message"),
    [
        ("text", "", "is no model of video; sample needs a run of video"),
        ("video", "", "holds no moving average of the weights; train with training.ema_decay"),
        ("video", "checkpoints/step_00000009", "no such folder; beside it are step_00000001"),
        ("video", "elsewhere", "no such folder; give a run of video"),
        ("video", "checkpoints", "is no model of video"),
    ],
)
def test_runs_that_cannot_be_sampled_are_refused_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, place: str, message: str
) -> None:
    values = {"text": recipe_values, "video": video_recipe_values}[kind]
    run = saved_run(tmp_path / "run", values(tmp_path, tmp_path / "run"))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--prompt", "a red square", "--weights", "ema"]
    assert main(["sample", str(run / place), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path / "run", video_recipe_values(tmp_path, tmp_path / "run"))
    assert main(["sample", str(run), "--prompt", "a red square", "--weights", "raw"]) == 2
    said = capsys.readouterr().err
    assert "is missing; the checkpoint has bias" in said and "another recipe" in said


def test_a_codec_that_is_not_the_shards_own_is_refused() -> None:
    codec, text = HaarCodec().record, HashedSubwords(8).record
    manifest = VideoManifest(codec, text, buckets={}, tars=(), index_sha256="")
    assert open_encoders(manifest)[0].record == codec
    other = dataclasses.replace(codec, sha256="f" * 64)
    with pytest.raises(DataError, match="haar: is not what the shards were made with"):
        open_encoders(dataclasses.replace(manifest, codec=other))
    other_text = dataclasses.replace(text, sha256="f" * 64)
    with pytest.raises(DataError, match="hashed:8: is not what the shards were made with"):
        open_encoders(dataclasses.replace(manifest, text_encoder=other_text))


def test_a_run_whose_shards_are_elsewhere_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(shipped_recipe("demo_video.yaml"))
    assert isinstance(recipe, VideoRecipe)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"shards are not there.*--shards"):
        manifest_of(recipe, None)
    write_drawn_folder(tmp_path / "copy", {"clip32": 1})
    assert manifest_of(recipe, tmp_path / "copy").codec.name == "haar"


def test_the_schedule_is_shifted_as_the_last_phase_was() -> None:
    recipe = load_recipe(shipped_recipe("demo_video.yaml"))
    assert isinstance(recipe, VideoRecipe)
    assert last_timestep_shift(recipe) == 3


@pytest.mark.parametrize(
    ("wish", "message"),
    [({"prompts": ()}, "give --prompt"), ({"prompts": ("a",), "num_steps": 0}, "1 or more")],
)
def test_wishes_that_cannot_be_met_are_refused(wish: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Wish(**wish)
