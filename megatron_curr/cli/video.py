"""Verbs of video: preprocess-video, sample."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from megatron_curr.cli.app import AsJson, app
from megatron_curr.cli.work import (
    ClusterProfile,
    Finish,
    NumTasks,
    NumWorkers,
    SlurmArray,
    TaskNumber,
    submit_here,
    told_failure,
)

if TYPE_CHECKING:
    from data_tools.video_frames import Bucket
    from megatron_curr.sample.encoders import Speech
    from megatron_curr.sample.run import Sampled
    from megatron_curr.sample.wish import Wish

_SIZE = re.compile(r"(?P<height>\d+)x(?P<width>\d+)(?:x(?P<frames>\d+))?")
_SHAPE = re.compile(rf"(?P<name>\w+)={_SIZE.pattern}")

Media = Annotated[
    list[Path],
    typer.Argument(
        help="Videos, images, folders of them, or lists of them with captions (.jsonl, .csv, "
        ".parquet, .txt)."
    ),
]
ShardsOut = Annotated[
    Path, typer.Option(help="Folder of one source; gets train/, heldout/ and rejects.jsonl.")
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="A video recipe, to take the source's buckets from.")
]
SourceName = Annotated[str | None, typer.Option(help="Which source of the recipe.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=HEIGHTxWIDTH[xFRAMES]",
        help="A shape of samples, in pixels; may be repeated. Without frames: images.",
    ),
]
CodecName = Annotated[str, typer.Option(help="haar, diffusers:FOLDER or mugv:FILE.")]
EncoderName = Annotated[str, typer.Option(help="hashed:WIDTH or transformers:FOLDER.")]
Decoder = Annotated[str, typer.Option(help="pyav or dali.")]
Fps = Annotated[float, typer.Option(help="Frames a second; slower files keep theirs.")]
MaxClips = Annotated[int, typer.Option(min=1, help="Most clips cut from one file.")]
MaxCrop = Annotated[
    float, typer.Option(help="Most of a picture that cropping to a bucket may cut away.")
]
MinMotion = Annotated[
    float, typer.Option(help="Least mean change between frames, of 255; else static.")
]
MinSharpness = Annotated[float, typer.Option(help="Least variance of the Laplacian; else blurred.")]
OneBucket = Annotated[
    bool, typer.Option("--one-bucket", help="Each file to its largest bucket only, not to all.")
]
HeldoutFrac = Annotated[
    float, typer.Option(help="Share of the files to hold out, by hash of their content.")
]
FileField = Annotated[str, typer.Option(help="Column of a list with the path.")]
CaptionField = Annotated[str, typer.Option(help="Column with the caption.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace shards that are there already.")
]


@app.command(
    epilog="Example: megatron-curr preprocess-video data/demo_video/clips "
    "--recipe configs/demo_video.yaml --source shapes --output data/demo_video/shapes"
)
def preprocess_video(
    inputs: Media,
    output: ShardsOut,
    recipe: RecipeOption = None,
    source: SourceName = None,
    bucket: Shapes = None,
    codec: CodecName = "haar",
    text_encoder: EncoderName = "hashed:256",
    decoder: Decoder = "pyav",
    fps: Fps = 24.0,
    max_clips: MaxClips = 16,
    max_crop_frac: MaxCrop = 0.4,
    min_motion: MinMotion = 0.05,
    min_sharpness: MinSharpness = 1.0,
    one_bucket: OneBucket = False,
    heldout_frac: HeldoutFrac = 0.02,
    file_field: FileField = "file",
    caption_field: CaptionField = "caption",
    workers: NumWorkers = 1,
    num_tasks: NumTasks = 1,
    task: TaskNumber = None,
    finish: Finish = False,
    slurm_array: SlurmArray = None,
    profile: ClusterProfile = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Encode videos and images with captions into the latents and text features of one source."""
    from data_tools.video_clips import ClipOptions

    what: dict[str, Any] = {
        "inputs": inputs,
        "buckets": _buckets(recipe, source, bucket or []),
        "options": ClipOptions(
            codec=codec,
            text_encoder=text_encoder,
            decoder=decoder,
            fps=fps,
            max_clips=max_clips,
            max_crop_frac=max_crop_frac,
            min_motion=min_motion,
            min_sharpness=min_sharpness,
            one_bucket=one_bucket,
            heldout_frac=heldout_frac,
        ),
        "file_field": file_field,
        "caption_field": caption_field,
    }
    where: dict[str, Any] = {"output": output, "overwrite": overwrite}
    how = {"workers": workers, "num_tasks": num_tasks, "task": task, "finish": finish}
    if slurm_array is None:
        _preprocess_here(what, where, how, as_json=as_json)
    else:
        _submit(what, where, profile, num_tasks=slurm_array, cpus=workers)


def _preprocess_here(
    what: dict[str, Any], where: dict[str, Any], how: dict[str, Any], *, as_json: bool
) -> None:
    from data_tools.preprocess_video import preprocess_video as write_shards

    with told_failure():
        summary = write_shards(**what, **where, **how, show_progress=not as_json)
    typer.echo(summary.json() if as_json else summary.text())


def _submit(
    what: dict[str, Any], where: dict[str, Any], profile: Path | None, *, num_tasks: int, cpus: int
) -> None:
    """Mistakes are told here, not by the tasks, and none of them has to make way for another."""
    from data_tools.preprocess_video import open_staging, plan_job

    if open_staging(plan_job(**what), **where):
        submit_here(where["output"], profile, num_tasks=num_tasks, cpus=cpus)
    else:
        typer.echo(f"{where['output']}: already done")


def _buckets(recipe: Path | None, source: str | None, shapes: list[str]) -> list[Bucket]:
    """The recipe's buckets of a source, then those of ``--bucket``."""
    from data_tools.video_frames import Bucket

    buckets = []
    if recipe is not None:
        from data_tools.video_clips import buckets_of_recipe

        buckets = buckets_of_recipe(recipe, source)
    for shape in shapes:
        match = _SHAPE.fullmatch(shape)
        if match is None:
            raise typer.BadParameter(f"--bucket {shape}: write NAME=HEIGHTxWIDTH[xFRAMES]")
        sizes = (int(match[part] or 1) for part in ("height", "width", "frames"))
        buckets.append(Bucket(match["name"], *sizes))
    return buckets


Prompts = Annotated[list[str], typer.Option(help="What to show; may be repeated.")]
ClipsOut = Annotated[
    Path | None, typer.Option(help="Folder for clips and contact sheet. Default: MODEL/samples.")
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="How a published model was made to be sampled: mugv (negative prompt, suffix, frame "
        "rate, steps, guidance, size). Options given beside it go before."
    ),
]
Negative = Annotated[
    str | None, typer.Option(help="What to lead away from. Default: nothing.", show_default=False)
]
Suffix = Annotated[str | None, typer.Option("--prompt-suffix", help="Goes behind every prompt.")]
Picture = Annotated[
    Path | None, typer.Option(help="A picture to go on from, as the first latent frame.")
]
BucketName = Annotated[
    str | None, typer.Option(help="Shape, by its name in the recipe. Default: the largest.")
]
ClipSize = Annotated[
    str | None,
    typer.Option(
        metavar="HEIGHTxWIDTH[xFRAMES]", help="Shape in pixels, where no recipe names buckets."
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Euler steps. Default: 25.")]
Guidance = Annotated[
    float | None,
    typer.Option(help="How far from the negative prompt; 1 is the prompt alone. Default: 4."),
]
Shift = Annotated[
    float | None, typer.Option(help="Of the schedule towards noise. Default: as trained.")
]
ClipFps = Annotated[float | None, typer.Option(help="Frames a second. Default: the shards' rate.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips at a time.")]
WeightsKind = Annotated[
    Literal["auto", "ema", "raw"],
    typer.Option(help="The moving average, or the weights; auto: the average if kept."),
]
ShardsIn = Annotated[
    Path | None,
    typer.Option(help="Shards that name codec and text encoder. Default: the run's."),
]
CodecName = Annotated[
    str | None,
    typer.Option(help="haar, diffusers:FOLDER or mugv:FILE. Default: as the shards say."),
]
TextEncoderName = Annotated[
    str | None,
    typer.Option(help="hashed:WIDTH or transformers:FOLDER. Default: as the shards say."),
]


@app.command(
    epilog='Example: megatron-curr sample runs/demo_video --prompt "a red square moves left"'
)
def sample(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A run of video, one of its checkpoints, or whatever convert reads or writes: "
            "dit.pt, safetensors with a config, a converted or MUG-V's own checkpoint.",
        ),
    ],
    prompt: Prompts,
    output: ClipsOut = None,
    preset: Preset = None,
    negative_prompt: Negative = None,
    prompt_suffix: Suffix = None,
    image: Picture = None,
    bucket: BucketName = None,
    size: ClipSize = None,
    steps: Steps = None,
    guidance: Guidance = None,
    shift: Shift = None,
    fps: ClipFps = None,
    seed: Seed = 0,
    batch: Batch = 8,
    weights: WeightsKind = "auto",
    shards: ShardsIn = None,
    codec: CodecName = None,
    text_encoder: TextEncoderName = None,
    as_json: AsJson = False,
) -> None:
    """Sample clips from a checkpoint of any layout or a published model: mp4, contact sheet."""
    from megatron_curr.sample.encoders import Speech
    from megatron_curr.sample.wish import make_wish

    wish = make_wish(
        preset,
        prompts=tuple(prompt),
        negative_prompt=negative_prompt,
        prompt_suffix=prompt_suffix,
        image=image,
        bucket=bucket,
        size=_clip_size(size),
        num_steps=steps,
        guidance=guidance,
        shift=shift,
        fps=fps,
        seed=seed,
        batch=batch,
    )
    beside = checkpoint.parent if checkpoint.is_file() else checkpoint
    if checkpoint.parent.name == "checkpoints":
        beside = checkpoint.parent.parent
    speech = Speech(shards, codec, text_encoder)
    done = _sample(checkpoint, output or beside / "samples", wish, weights, speech, quiet=as_json)
    if as_json:
        told = {"folder": done.folder, "clips": done.clips, "contact_sheet": done.sheet}
        told |= {"checkpoint": done.checkpoint, "weights": done.weights}
        typer.echo(json.dumps(told, default=lambda path: str(path)))
        return
    typer.echo(f"{len(done.clips)} clips in {done.elapsed_s:.1f} s from {done.checkpoint}")
    typer.echo(f"{done.weights} weights; contact sheet {done.sheet}")


def _clip_size(size: str | None) -> tuple[int, int, int] | None:
    if size is None:
        return None
    match = _SIZE.fullmatch(size)
    if match is None:
        raise typer.BadParameter(
            f"--size {size}: write HEIGHTxWIDTH[xFRAMES], such as 720x1280x105"
        )
    return int(match["height"]), int(match["width"]), int(match["frames"] or 1)


def _sample(
    checkpoint: Path,
    output: Path,
    wish: Wish,
    weights: Literal["auto", "ema", "raw"],
    speech: Speech,
    *,
    quiet: bool,
) -> Sampled:
    """With a bar."""
    from rich.console import Console
    from rich.progress import Progress

    from megatron_curr.sample.run import sample as sample_clips

    with Progress(console=Console(stderr=True), transient=True, disable=quiet) as bar:
        task = bar.add_task("sample")
        return sample_clips(
            checkpoint,
            output,
            wish,
            weights=weights,
            speech=speech,
            tell=lambda step, total: bar.update(task, completed=step, total=total),
        )
