"""The application that verbs join, and the arguments that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_curr import __version__
from megatron_curr.units import parse_count

app = typer.Typer(
    name="megatron-curr",
    help="Pretrain models on Megatron-Core with one curriculum driven by consumed tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A recipe, in YAML; or a run, for its own.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


def count(text: str) -> int:
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
