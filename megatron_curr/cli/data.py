"""Verbs that make data: preprocess, train-tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_curr.cli.app import AsJson, app, count


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
        int, typer.Option(parser=count, metavar="TOKENS", help="Size of a shard.")
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


@app.command(
    epilog="Example: megatron-curr train-tokenizer data/prose.jsonl --output data/tokenizer.model"
)
def train_tokenizer(
    inputs: Annotated[list[Path], typer.Argument(help="Jsonl files, or folders of them.")],
    output: Annotated[Path, typer.Option(help="The .model file to write.")],
    vocab_size: Annotated[
        int, typer.Option(parser=count, metavar="PIECES", help="Such as 8192 or 32k.")
    ] = 8192,
) -> None:
    """Train a SentencePiece tokenizer with byte fallback."""
    from data_tools.train_tokenizer import train_tokenizer as train_pieces

    train_pieces(inputs, output, vocab_size=vocab_size)
    typer.echo(str(output))
