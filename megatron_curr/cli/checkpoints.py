"""Verbs on checkpoints: convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_curr.cli.app import app


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
