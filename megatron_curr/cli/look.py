"""Verbs that look: report, trace, diff, doctor, schema, reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_curr.cli.app import AsJson, Overrides, RunFolder, app, count
from megatron_curr.errors import RecipeError


@app.command(epilog="Example: megatron-curr report runs/demo_text")
def report(run: RunFolder) -> None:
    """Write report.html into a run's folder: one page that needs nothing beside it."""
    from megatron_curr.report.build import write_report

    typer.echo(str(write_report(run)))


@app.command(epilog="Example: megatron-curr trace configs/demo_text.yaml --token 900k --count 4")
def trace(
    target: Annotated[Path, typer.Argument(metavar="RECIPE|RUN", help="A recipe or a run.")],
    position: Annotated[
        int | None, typer.Option(min=0, help="First sample, counted from 0. Default: 0.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="How many samples. Default: 1.")] = None,
    token: Annotated[
        int | None,
        typer.Option(parser=count, metavar="TOKENS", help="Start at the sample of this token."),
    ] = None,
    document: Annotated[
        str | None,
        typer.Option(metavar="SHARD:I", help="Every sample that reads document I of this shard."),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Decode the samples as well.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Of a run: did every step read what the ledger says?"),
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Say which documents a sample is made of, or when a document is read; builds no model."""
    if verify:
        from megatron_curr.trace_verify import verify_run

        verdict = verify_run(target, overrides or [])
        typer.echo(verdict.as_json() if as_json else verdict.as_text())
        raise typer.Exit(0 if verdict.agrees else 1)
    from megatron_curr.trace import trace_command

    _refuse_together({"--position": position, "--token": token, "--document": document})
    _refuse_together({"--count": count, "--document": document})
    lines = trace_command(
        target,
        position=position or 0,
        count=count or 1,
        token=token,
        document=document,
        text=text,
        as_json=as_json,
        overrides=overrides or [],
    )
    for line in lines:
        typer.echo(line)


def _refuse_together(options: dict[str, object]) -> None:
    """Raise ``RecipeError`` where two options that say the same are given."""
    given = [f"{name} {value}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise RecipeError(f"{' and '.join(given)}: they contradict each other; give one of them")


@app.command(epilog="Example: megatron-curr diff configs/llama3_8b.yaml configs/llama3_70b.yaml")
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="A recipe, or the folder of a run.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: AsJson = False,
) -> None:
    """Say what two recipes or runs do differently: settings, curriculum, and the first steps.

    Exits with 1 where what is trained differs, with 0 where only names and places do.
    """
    from megatron_curr.compare import compare

    found = compare(a, b)
    typer.echo(found.as_json() if as_json else found.as_text())
    raise typer.Exit(0 if found.is_same else 1)


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
    from megatron_curr.recipe.kinds import recipe_json_schema

    typer.echo(json.dumps(recipe_json_schema(), indent=2))


@app.command(epilog="Example: megatron-curr reference recipe | less")
def reference(
    page: Annotated[
        Literal["recipe", "metrics"],
        typer.Argument(help="recipe: every key and preset; metrics: every name and unit."),
    ],
) -> None:
    """Print a reference page, as docs/recipe.md and docs/metrics.md hold it."""
    from megatron_curr.reference import PAGES

    typer.echo(PAGES[page](), nl=False)
