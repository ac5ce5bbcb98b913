"""The command line: one function a verb, each of which imports what it runs when it runs.

So ``--help``, ``schema`` and ``trace`` start without torch. A user's mistake becomes one message on
stderr and exit code 2; 1 means that the work failed, 130 that it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from megatron_curr import __version__
from megatron_curr.errors import UserError
from megatron_curr.units import parse_count

app = typer.Typer(
    name="megatron-curr",
    help="Pretrain models on Megatron-Core with one curriculum driven by consumed tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, in YAML.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; ``arguments`` default to the command line's."""
    try:
        app(args=None if arguments is None else list(arguments))
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    except UserError as error:
        _print_error(str(error))
        return 2
    return 0


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble(("error: ", "bold red"), message)
    Console(stderr=True, soft_wrap=True, highlight=False).print(text)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def _count(text: str) -> int:
    """A token count from the command line; typer shows the message of a ``BadParameter``."""
    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """Options that stand before the verb."""


@app.command(epilog="Example: megatron-curr demo")
def demo(
    folder: Annotated[Path, typer.Option(help="Where the corpus and the run are written.")] = Path(
        "."
    ),
) -> None:
    """Make a corpus, train on it, resume on another layout, export and report; needs no network."""
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
            parser=_count,
            metavar="TOKENS",
            help="Save and end at the first step on or after this token, such as 900k.",
        ),
    ] = None,
) -> None:
    """Train a recipe, from its newest checkpoint where the run folder holds one."""
    from launch.local import launch_training

    raise typer.Exit(launch_training(recipe, overrides or [], ranks, stop_at_tokens=stop_at))


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


@app.command(epilog="Example: megatron-curr convert runs/demo_text runs/demo_text/hf")
def convert(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run, or one of its checkpoint folders.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder to write in Hugging Face format.")],
    dtype: Annotated[str | None, typer.Option(help="fp32 or bf16. Default: as stored.")] = None,
) -> None:
    """Write the newest intact checkpoint as a Hugging Face folder: weights, config, tokenizer."""
    from megatron_curr.convert.export import export_run

    done = export_run(run, output, dtype=dtype)
    for fault in done.passed_over:
        typer.echo(f"passed over {fault}", err=True)
    typer.echo(
        f"{done.folder}: {done.architecture}, {done.num_parameters:,} parameters in {done.dtype}, "
        f"from {done.checkpoint}"
    )


@app.command(epilog="Example: megatron-curr report runs/demo_text")
def report(run: RunFolder) -> None:
    """Write report.html into a run's folder: one page that needs nothing beside it."""
    from megatron_curr.report.build import write_report

    typer.echo(str(write_report(run)))


@app.command(epilog="Example: megatron-curr trace configs/demo_text.yaml --token 900k --count 4")
def trace(
    target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe or a run.")],
    position: Annotated[int, typer.Option(min=0, help="First sample, counted from 0.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many samples.")] = 1,
    token: Annotated[
        int | None,
        typer.Option(parser=_count, metavar="TOKENS", help="Start at this token instead."),
    ] = None,
    document: Annotated[
        str | None,
        typer.Option(metavar="SHARD:I", help="When is document I of this shard read?"),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Decode the samples as well.")] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Say which documents a sample is made of, or when a document is read; builds no model."""
    from megatron_curr.trace import trace_command

    lines = trace_command(
        target,
        position=position,
        count=count,
        token=token,
        document=document,
        text=text,
        as_json=as_json,
        overrides=overrides or [],
    )
    for line in lines:
        typer.echo(line)


@app.command(epilog="Example: megatron-curr doctor configs/demo_text.yaml")
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Also say what this recipe will use.")
    ] = None,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Say what this machine has, what is wrong with it, and which modules a recipe will use."""
    from megatron_curr.doctor import doctor as examine
    from megatron_curr.recipe.load import load_recipe

    typer.echo(examine(load_recipe(recipe, overrides or []) if recipe else None, as_json=as_json))


@app.command(epilog="Example: megatron-curr schema > recipe.schema.json")
def schema() -> None:
    """Print the JSON schema of recipes, for completion and checks in an editor."""
    from megatron_curr.recipe.schema import Recipe

    typer.echo(json.dumps(Recipe.model_json_schema(by_alias=True), indent=2))


@app.command(
    epilog="Example: megatron-curr train-tokenizer data/prose.jsonl --output data/tokenizer.model"
)
def train_tokenizer(
    inputs: Annotated[list[Path], typer.Argument(help="Jsonl files, or folders of them.")],
    output: Annotated[Path, typer.Option(help="The .model file to write.")],
    vocab_size: Annotated[
        int, typer.Option(parser=_count, metavar="PIECES", help="Such as 8192 or 32k.")
    ] = 8192,
) -> None:
    """Train a SentencePiece tokenizer with byte fallback."""
    from data_tools.train_tokenizer import train_tokenizer as train_pieces

    train_pieces(inputs, output, vocab_size=vocab_size)
    typer.echo(str(output))


@app.command(
    epilog="Example: megatron-curr preprocess data/prose.jsonl --tokenizer data/tokenizer.model "
    "--output data/shards/prose"
)
def preprocess(
    inputs: Annotated[list[Path], typer.Argument(help="Jsonl files, or folders of them.")],
    tokenizer: Annotated[str, typer.Option(help="A .model file or a Hugging Face folder.")],
    output: Annotated[
        Path, typer.Option(help="Folder of one source; gets train/, heldout/ and rejects.jsonl.")
    ],
    heldout_frac: Annotated[
        float, typer.Option(help="Share of the documents to hold out, by hash of the text.")
    ] = 0.02,
    shard_tokens: Annotated[
        int, typer.Option(parser=_count, metavar="TOKENS", help="Size of a shard.")
    ] = 1_000_000_000,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    threads: Annotated[int, typer.Option(min=1, help="Threads that tokenize.")] = 2,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace shards that are there already.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Tokenize the documents of one source into indexed .bin/.idx shards, some of them held out."""
    from data_tools.preprocess_text import Options
    from data_tools.preprocess_text import preprocess as write_shards

    summary = write_shards(
        inputs,
        output,
        tokenizer=tokenizer,
        options=Options(
            text_field=text_field, heldout_frac=heldout_frac, shard_tokens=shard_tokens
        ),
        overwrite=overwrite,
        num_threads=threads,
        show_progress=not as_json,
    )
    typer.echo(summary.json() if as_json else summary.text())
