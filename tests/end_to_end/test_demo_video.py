"""The whole video demo on a smaller recipe, what `sample` makes of its run, and the demo again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import launch.demo_video as demo_module
from data_tools.make_video_demo import draw, scene
from data_tools.video_decode import opened
from launch.demo_video import run_video_demo
from megatron_curr.cli import main
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.sample.run import sample
from megatron_curr.sample.wish import Wish


@pytest.fixture
def small_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    values = yaml.safe_load(shipped_recipe("demo_video.yaml").read_text())
    values["model"].update(num_layers=2, hidden_size=48, num_attention_heads=2)
    for bucket, samples in {"image32": 8, "clip32": 4, "clip64": 2}.items():
        values["data"]["buckets"][bucket]["batch_samples"] = samples
    for phase in values["curriculum"]["phases"]:
        phase.update(tokens=1024, global_batch_tokens=256, learning_rate=1e-3)
    values["curriculum"]["phases"][0]["tasks"] = {"t2v": 0.5, "i2v": 0.5}
    values["parallel"] |= {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    values["evaluation"] = {"every_tokens": 2048}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr(demo_module, "shipped_recipe", lambda name: path)
    return path


def frames_of(path: Path) -> np.ndarray:
    with opened(path) as media:
        return np.stack([frame for _, frame in media.frames])


@pytest.mark.slow
def test_the_video_demo_runs_through_and_again(
    small_recipe: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "here"
    assert run_video_demo(folder, num_clips=84, num_pictures=48) == 0
    told = capfd.readouterr().out
    for step in range(1, 6):
        assert f"step {step} of 5" in told
    assert "14 clips with the ema weights" in told
    assert "steps agree, tokens 0 to" in told
    run = folder / "runs" / "demo_video"
    assert {phase in (run / "report.html").read_text() for phase in ("pictures", "large")} == {True}
    samples = run / "samples"
    assert len(list(samples.glob("*.mp4"))) == 14 and (samples / "contact_sheet.png").is_file()
    assert frames_of(samples / "000.mp4").shape == (32, 64, 64, 3)

    # From a checkpoint of two tensor ranks, on one: in any batches, by either weights.
    prompts = ("a red square grows", "a blue bar rotates", "a green circle moves up")
    one, three = (
        sample(run, tmp_path / f"by{batch}", Wish(prompts, num_steps=2, batch=batch))
        for batch in (1, 3)
    )
    for alone, together in zip(one.frames, three.frames, strict=True):
        assert np.abs(alone.astype(int) - together).max() <= 1
    raw = sample(run, tmp_path / "raw", Wish(prompts[:1], num_steps=2), weights="raw")
    assert (raw.weights, one.weights) == ("raw", "ema")
    assert not np.array_equal(raw.frames[0], one.frames[0])

    picture = draw(scene(3))[0]
    Image.fromarray(picture).save(tmp_path / "first.png")
    arguments = [
        "sample",
        str(run),
        "--prompt",
        "a red square moves down",
        "--steps",
        "2",
        "--json",
    ]
    assert main([*arguments, "--image", str(tmp_path / "first.png"), "--bucket", "clip64"]) == 0
    done = json.loads(capfd.readouterr().out.splitlines()[-1])
    shown = frames_of(Path(done["clips"][0]))
    # The codec sees blocks of 4 x 4 pixels.
    blocks = picture.reshape(16, 4, 16, 4, 3).mean((1, 3)).repeat(4, 0).repeat(4, 1)
    assert np.abs(shown[0] - blocks).mean() < 6 < np.abs(shown[-1] - blocks).mean()
    assert main([*arguments, "--bucket", "cinema"]) == 2
    assert "no bucket 'cinema' in the recipe; choose of" in capfd.readouterr().err
    assert main([*arguments, "--bucket", "image32", "--image", str(tmp_path / "first.png")]) == 2
    assert "cannot go on from an image" in capfd.readouterr().err

    assert run_video_demo(folder, num_clips=84, num_pictures=48) == 0
    told = capfd.readouterr().out
    assert told.count("is there already") == 3  # clips, shards, run
