"""Verbs that train, or look whether one could: demo, train, check, parity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_curr.cli.app import AsJson, Overrides, RecipeFile, app, count


@app.command(epilog="Example: megatron-curr demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the corpus and the run are written.")] = Path(
        "."
    ),
    video: Annotated[
        bool, typer.Option("--video", help="Clips and a video DiT instead of text.")
    ] = False,
) -> None:
    """Make a corpus, train on it, resume on another layout, export and report; needs no network.

    With --video: make clips, train a video model on them, sample clips and report.
    """
    if video:
        from launch.demo_video import run_video_demo

        raise typer.Exit(run_video_demo(folder))
    from launch.demo import run_demo

    raise typer.Exit(run_demo(folder))


@app.command(epilog="Example: megatron-curr train configs/demo_text.yaml --ranks 2")
def train(
    recipe: RecipeFile,
    ranks: Annotated[int, typer.Option(min=1, help="Processes on this machine.")] = 1,
    overrides: Overrides = None,
    stop_at: Annotated[
        int | None,
        typer.Option(
            parser=count,
            metavar="TOKENS",
            help="Save and end at the first step on or after this token, such as 900k.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all that can be known now; start nothing.")
    ] = False,
) -> None:
    """Train a recipe, from its newest checkpoint where the run folder holds one."""
    if dry_run:
        _check(recipe, overrides, ranks, as_json=False)
        return
    from launch.local import launch_training

    raise typer.Exit(launch_training(recipe, overrides or [], ranks, stop_at_tokens=stop_at))


@app.command(epilog="Example: megatron-curr check configs/demo_text.yaml --ranks 2")
def check(
    recipe: RecipeFile,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks. Default: as few as the layout takes.")
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Find all that training would refuse: recipe, layout, data, tokenizer, init_from, disk.

    Starts no rank, writes nothing, and claims no folder; exits with 2 and the reason.
    """
    _check(recipe, overrides, ranks, as_json=as_json)


def _check(recipe: Path, overrides: list[str] | None, ranks: int | None, *, as_json: bool) -> None:
    from launch.check import check_recipe_file

    checked = check_recipe_file(recipe, overrides or [], ranks)
    typer.echo(checked.as_json() if as_json else checked.as_text())


@app.command(
    epilog="Example: megatron-curr parity configs/demo_text.yaml --layouts tp2sp,pp2,cp2,tp2cp2sp"
)
def parity(
    recipe: RecipeFile,
    layouts: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Layouts to check, such as tp2sp,pp2vpp2,cp2ring,dp2do,tp2pp2cp2spdo or recipe.",
        ),
    ],
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="The layout they must agree with: one rank.")
    ] = "1",
    steps: Annotated[int, typer.Option(min=1, help="Steps to take on each.")] = 3,
    precision: Annotated[
        str, typer.Option(help="fp32, where rounding hides least, or bf16, as kernels may need.")
    ] = "fp32",
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest relative difference. Default: 2e-5; bf16: 5e-2."),
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Take a recipe's first steps on several layouts and compare losses, gradients and weights."""
    from launch.parity import Question, check_parity

    question = Question(
        layouts=tuple(dict.fromkeys(name.strip() for name in layouts.split(","))),
        reference=reference,
        num_steps=steps,
        precision=precision,
        tolerance=tolerance,
    )
    raise typer.Exit(check_parity(recipe, overrides or [], question, as_json=as_json))
