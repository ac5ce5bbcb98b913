"""Verbs on checkpoints: convert, merge."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from megatron_curr.cli.app import app
from megatron_curr.errors import RecipeError

if TYPE_CHECKING:
    from megatron_curr.convert.run_conversion import Conversion

Target = Literal["hf", "checkpoint"]
ConvertTarget = Literal["hf", "checkpoint", "mugv"]
OutputArgument = Annotated[Path, typer.Argument(help="Folder to write; must not hold anything.")]
ToOption = Annotated[
    Target | None,
    typer.Option(
        help="hf (a Hugging Face folder) or checkpoint (torch_dist). Default: the other one."
    ),
]
DtypeOption = Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. Default: as stored.")]
VerifyOption = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Run the same tokens through both models. Default: where both fit into memory.",
    ),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-pickle", help="Read .bin files that hold more than tensors: runs code."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the outcome as JSON.")]


@app.command(epilog="Example: megatron-curr convert runs/demo_text runs/demo_text/hf")
def convert(
    source: Annotated[
        Path,
        typer.Argument(help="A run, one of its checkpoints, a converted one or a model folder."),
    ],
    output: OutputArgument,
    to: Annotated[
        ConvertTarget | None,
        typer.Option(
            help="hf (a Hugging Face folder), checkpoint (torch_dist), or of a video model mugv "
            "(dit.pt). Default: the other one, and mugv for a video model's checkpoint."
        ),
    ] = None,
    dtype: DtypeOption = None,
    weights: Annotated[
        Literal["raw", "ema"],
        typer.Option(help="Of a run: the trained weights, or their moving average."),
    ] = "raw",
    architecture: Annotated[
        str | None, typer.Option(help="Hugging Face architecture, where several fit.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file to publish as the chat template.")
    ] = None,
    verify: VerifyOption = None,
    trust_pickle: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint as a Hugging Face folder, or a Hugging Face folder as a checkpoint."""
    from megatron_curr.convert.run_conversion import run_conversion
    from megatron_curr.convert.video import convert_video, is_video

    if is_video(source):
        done = convert_video(
            source, output, to=to, dtype=dtype, which=weights, trust_pickle=trust_pickle
        )
        _tell(done, as_json=as_json)
        return
    if to == "mugv":
        raise RecipeError("--to mugv: is for video models; leave it out")
    done = run_conversion(
        source,
        output,
        to=to,
        dtype=dtype,
        architecture=architecture,
        chat_template=chat_template,
        verify=verify,
        trust_pickle=trust_pickle,
        which=weights,
    )
    _tell(done, as_json=as_json)


@app.command(
    epilog="Example: megatron-curr merge averaged runs/a/checkpoints/step_00000100 "
    "runs/a/checkpoints/step_00000200"
)
def merge(
    output: OutputArgument,
    sources: Annotated[list[Path], typer.Argument(help="As for convert, two or more.")],
    method: Annotated[
        Literal["average", "linear", "spherical", "residual"],
        typer.Option(
            help="average of all; linear or spherical from the first to the second; residual: the "
            "first plus (the second less the third)."
        ),
    ] = "average",
    by: Annotated[
        float, typer.Option(help="How far to go; how much of the residual to add.")
    ] = 1.0,
    to: ToOption = "hf",
    dtype: DtypeOption = None,
    trust_pickle: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Combine checkpoints of one architecture into one, streaming."""
    from megatron_curr.convert.merge import merge as merged
    from megatron_curr.convert.run_conversion import convert_source
    from megatron_curr.convert.source import open_source
    from megatron_curr.convert.video import (
        convert_video_source,
        is_video,
        open_video_source,
        video_pieces,
    )

    videos = [path for path in sources if is_video(path)]
    if videos and len(videos) < len(sources):
        raise RecipeError(f"{videos[0]} is a video model and others are not; merge one kind")
    open_one = open_video_source if videos else open_source
    opened = [open_one(path, trust_pickle=trust_pickle) for path in sources]
    if videos:
        source = merged(opened, method=method, by=by, pieces_of=video_pieces)
        done = convert_video_source(source, output, to=to or "hf", dtype=dtype)
    else:
        source = merged(opened, method=method, by=by)
        done = convert_source(source, output, to=to or "hf", dtype=dtype)
    _tell(done, as_json=as_json)


def _tell(done: Conversion, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(done), default=str, indent=2))
        return
    for fault in done.passed_over:
        typer.echo(f"passed over {fault}", err=True)
    typer.echo(
        f"{done.folder}: {done.architecture}, {done.num_parameters:,} parameters, "
        f"{done.size_bytes / 1e9:.2f} GB, from {done.source}"
    )
    typer.echo(done.verdict)
