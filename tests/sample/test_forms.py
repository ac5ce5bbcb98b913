"""Every form in which a video model is kept gives the same clips; the release's own way works."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.make_video_demo import draw, scene
from megatron_curr.cli import main
from megatron_curr.convert.video_first_weights import video_first_weights
from megatron_curr.data.codecs import Codec, HaarCodec, load_codec
from megatron_curr.data.text_features import HashedSubwords
from megatron_curr.errors import DataError
from megatron_curr.parallel.groups import one_rank
from megatron_curr.recipe.load import load_recipe
from megatron_curr.sample.encoders import Encoders
from megatron_curr.sample.model import TrainedModel, trained_model
from megatron_curr.sample.run import Studio
from megatron_curr.sample.wish import make_wish, preset_names
from tests.convert.test_video import save, write_recipe
from tests.data.test_mugv_codec import file as mugv_file  # noqa: F401
from tests.data.test_mugv_codec import state  # noqa: F401
from tests.ranks import run_ranks
from tests.training.tiny_video import MODEL, TEXT_WIDTH

SPEECH = ["--codec", "haar", "--text-encoder", f"hashed:{TEXT_WIDTH}"]
WISH = ["--prompt", "a red square", "--steps", "2", "--size", "32x48x9"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in every form that there is; each name is a form."""
    folder = tmp_path_factory.mktemp("forms")
    model = {**MODEL, "in_channels": 24, "out_channels": 48}
    run = write_recipe(folder / "run", "one", model=model)
    run_ranks(save, 1, run, folder / "run.pt")
    for form, arguments in {
        "release": ["--to", "mugv"],
        "safetensors": ["--to", "hf"],
        "converted": ["--to", "checkpoint"],
    }.items():
        assert main(["convert", str(run), str(folder / form), *arguments]) == 0
    # What MUG-V's training leaves: a tracker, a folder an iteration, no recipe of ours.
    trained = folder / "trained"
    trained.mkdir()
    (checkpoint,) = (run / "checkpoints").glob("step_*")
    shutil.copytree(checkpoint, trained / "iter_0000300")
    (trained / "latest_checkpointed_iteration.txt").write_text("300\n")
    return folder


def sampled(place: Path, output: Path, *more: str) -> bytes:
    """The sampled clip's bytes."""
    arguments = ["--output", str(output), *WISH, *SPEECH, *more]
    assert main(["sample", str(place), *arguments]) == 0
    return (output / "000.mp4").read_bytes()


FORMS = ["release", "release/dit.pt", "safetensors", "converted", "trained", "trained/iter_0000300"]


@pytest.fixture(scope="module")
def clip_of_the_run(forms: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return sampled(forms / "run", tmp_path_factory.mktemp("clip"), "--weights", "raw")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_sampled_alike(
    forms: Path, tmp_path: Path, clip_of_the_run: bytes, form: str
) -> None:
    assert sampled(forms / form, tmp_path) == clip_of_the_run
    told = json.loads((tmp_path / "sample.json").read_text())
    assert told["size"] == [32, 48, 9] and told["codec"] == "haar" and told["weights"] == "raw"


def test_the_average_of_a_training_checkpoint_is_found(forms: Path, tmp_path: Path) -> None:
    runs_own = sampled(forms / "run", tmp_path / "run")  # an average was kept, so it is taken
    assert sampled(forms / "trained", tmp_path / "trained", "--weights", "ema") == runs_own


@pytest.mark.parametrize("form", ["run", *FORMS])
def test_every_form_gives_first_weights(forms: Path, form: str) -> None:
    recipe = load_recipe(forms / "run" / "recipe.yaml")
    kind = "checkpoint" if form in ("run", "converted") or "trained" in form else "hf"
    begun = recipe.model_copy(update={"init_from": f"{kind}:{forms / form}"})
    fill = video_first_weights(begun)
    assert fill is not None
    expected = torch.load(forms / "run.pt")["raw"]
    with one_rank(), trained_weights(recipe, fill) as found:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


class trained_weights:
    """The weights of a model on one rank that ``fill`` has filled."""

    def __init__(self, recipe: object, fill: Callable) -> None:
        self.recipe, self.fill = recipe, fill

    def __enter__(self) -> dict[str, torch.Tensor]:
        from megatron_curr.models.video_dit import build_video_dit_chunks
        from megatron_curr.parallel.full_tensors import full_parameters
        from megatron_curr.parallel.groups import build_groups

        parallel = self.recipe.parallel
        groups = build_groups(parallel)
        chunks = build_video_dit_chunks(
            self.recipe.model, parallel=parallel, precision="fp32", groups=groups
        )
        self.fill(chunks, groups)
        return full_parameters(chunks, groups)

    def __exit__(self, *error: object) -> None:
        from megatron_curr.parallel.groups import destroy_groups

        destroy_groups()


@pytest.mark.parametrize(
    ("form", "arguments", "message"),
    [
        ("release", WISH, "give --codec and --text-encoder, or shards"),
        ("release", [*WISH[:4], *SPEECH], "give --size HEIGHTxWIDTH[xFRAMES], or a --preset"),
        (
            "run",
            [*WISH[:4], *SPEECH, "--bucket", "clop"],
            "no bucket 'clop' in the recipe; choose of",
        ),
        ("release", [*WISH[:4], "--size", "4x32x8", *SPEECH], "size 4x32x8: makes no latent"),
        ("release", [*WISH[:4], "--size", "32x32x12", *SPEECH], "take 8, 9 or 16"),
        ("release", [*WISH, "--codec", "haar", "--text-encoder", "hashed:9"], "the model takes 12"),
        ("release", [*WISH, *SPEECH, "--preset", "mug"], "did you mean 'mugv'?"),
        ("trained/iter_0000299", [*WISH, *SPEECH], "no such folder"),
    ],
)
def test_what_is_not_told_is_asked_for(
    forms: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, arguments: list,
    message: str,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    assert main(["sample", str(forms / form), "--output", str(out), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not out.exists()


def test_a_tracker_that_names_nothing_is_told(forms: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert main(["sample", str(tmp_path), *WISH, *SPEECH]) == 2
    assert "iter_0000007 is no torch_dist checkpoint" in " ".join(capsys.readouterr().err.split())


def test_the_release_has_a_preset_and_options_go_before_it() -> None:
    assert preset_names() == ["mugv"]
    wish = make_wish("mugv", prompts=("a cat",), guidance=3.0, fps=None)
    assert (wish.num_steps, wish.guidance, wish.fps) == (25, 3.0, 30)
    assert wish.size == (1280, 720, 105) and wish.negative_prompt.startswith("ugly, blurry")
    assert wish.prompts[0] + wish.prompt_suffix == "a cat aesthetic score: 6.0."
    assert make_wish("mugv", prompts=("a cat",), bucket="clip").size is None


@pytest.fixture
def studio_of(forms: Path) -> Callable:
    """A studio of the tiny model, with a codec of 24 channels."""

    def build(trained: TrainedModel, codec: Codec, **given: object) -> Studio:
        wish = make_wish(None, prompts=("a red square",), num_steps=1, **given)
        return Studio(trained, Encoders(codec, HashedSubwords(TEXT_WIDTH), 24.0), wish)

    return build


def test_windows_of_the_decoder_begin_after_the_image_latent(
    forms: Path,
    tmp_path: Path,
    studio_of: Callable,
    mugv_file: Path,  # noqa: F811
) -> None:
    """Of 8 latents, the release decodes 1 to 6, then 7; the picture stands in front as it is."""
    codec = load_codec(f"mugv:{mugv_file}")
    frames = draw(scene(3), size=16, num_frames=57)
    Image.fromarray(frames[0]).save(tmp_path / "first.png")
    latents = codec.encode(frames)
    assert latents.shape[1] == 8
    rest = np.concatenate([codec.decode(latents[:, 1:7]), codec.decode(latents[:, 7:])])
    with trained_model(forms / "release") as trained:
        given = studio_of(trained, codec, size=(16, 16, 57), image=tmp_path / "first.png")
        plain = studio_of(trained, codec, size=(16, 16, 57))
        shown, without_picture = given._decoded(latents), plain._decoded(latents)
    assert shown.shape == frames.shape and without_picture.shape == frames.shape
    assert (shown[0] == frames[0]).all()
    assert (shown[1:] == rest).all() and (without_picture[1:] == rest).all()
    assert (without_picture[0] == codec.decode(latents[:, :1])[-1]).all()


def test_sizes_of_the_release_that_eight_does_not_divide(
    forms: Path, tmp_path: Path, studio_of: Callable
) -> None:
    """832 x 1110 is 104 x 138 latents: what is left over at the border does not come back."""
    codec = HaarCodec()
    Image.new("RGB", (46, 28), "red").save(tmp_path / "red.png")
    with trained_model(forms / "release") as trained:
        studio = studio_of(trained, codec, size=(28, 46, 9), image=tmp_path / "red.png")
        (clip,) = studio.clips(lambda done, total: None)
        assert clip.shape == (9, 24, 40, 3)
        with pytest.raises(DataError, match="cannot go on from an image"):
            studio_of(trained, codec, size=(32, 32, 1), image=tmp_path / "red.png")


def test_a_run_may_name_where_its_encoders_are_now(forms: Path, studio_of: Callable) -> None:
    with trained_model(forms / "run", weights="raw") as trained:
        studio = studio_of(trained, HaarCodec())
        assert studio.size == (32, 64, 16)  # the largest of its buckets
        other = dataclasses.replace(trained, recipe=None)
        with pytest.raises(DataError, match="it has no buckets"):
            studio_of(other, HaarCodec())
