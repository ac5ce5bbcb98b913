"""Verbs that make shards of text and look at them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from megatron_curr.cli.app import AsJson, app, count
from megatron_curr.cli.work import (
    WORK,
    ClusterProfile,
    Finish,
    NumTasks,
    NumWorkers,
    SlurmArray,
    TaskNumber,
    option,
    submit_here,
    told_failure,
)

if TYPE_CHECKING:
    from data_tools.options import Options

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, globs or @list files: JSON, text, webdataset tar (each also .gz, "
        ".bz2, .xz, .zst), parquet, arrow."
    ),
]
Shards = Annotated[
    Path, typer.Argument(metavar="SHARDS", help="A shard folder, a glob, or one shard's prefix.")
]
TokenizerFile = Annotated[
    str, typer.Option(help="A SentencePiece .model, a Hugging Face folder, or a .tiktoken.")
]
SourceFolder = Annotated[
    Path, typer.Option(help="Folder of one source; gets train/, heldout/ and rejects.jsonl.")
]
HeldoutFrac = Annotated[
    float, typer.Option(help="Share of the documents to hold out, by hash of the text.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace shards that are there already.")
]
ShardTokens = Annotated[
    int, typer.Option(parser=count, metavar="TOKENS", help="Size of a shard, such as 500M.")
]
Workers = Annotated[int, typer.Option(min=1, help="Processes on this machine.")]
_CORPUS, _CHANGE = "Which documents", "What is done to them"

TextField = Annotated[
    str, option(_CORPUS, help="The field that holds the text; meta.text is text inside of meta.")
]
Metadata = Annotated[
    list[str] | None,
    option(
        _CORPUS,
        metavar="NAME[:TYPE]",
        help="Keep this field in the document table, as str, int, float or bool.",
    ),
]
Filter = Annotated[
    str | None,
    option(
        _CORPUS,
        "--filter",
        metavar="EXPRESSION",
        help="Keep what this holds for, such as 'quality > 0.5 and domain(url) != \"e.org\"'.",
    ),
]
Deduplicate = Annotated[
    bool, option(_CORPUS, "--deduplicate", help="Keep the first of equal texts.")
]
MaxDocumentBytes = Annotated[
    int, option(_CORPUS, parser=count, metavar="BYTES", help="Reject longer texts.")
]
TextByLine = Annotated[
    bool,
    option(_CORPUS, "--text-by-line", help="A text file is a document a line, not one document."),
]
MaxRejected = Annotated[
    float,
    option(
        _CORPUS,
        "--max-rejected",
        "--max-reject-frac",
        help="Fail where more than this share of the rows gives no document; 0.01 is 1 %.",
    ),
]
MaxUnknown = Annotated[
    float,
    option(
        _CHANGE,
        help="Fail where the tokenizer does not know more than this share of the tokens, or of the "
        "characters.",
    ),
]
SpecialTokens = Annotated[
    str,
    option(
        _CHANGE,
        metavar="text|allow|error",
        help="Special tokens typed in a text: plain text, tokens, or the end of the run.",
    ),
]
Bos = Annotated[
    str,
    option(
        _CHANGE,
        metavar="auto|yes|no",
        help="A BOS before each document: as the tokenizer itself sets one, always, or never.",
    ),
]
Template = Annotated[
    str | None,
    option(_CHANGE, help="Make the text from fields: 'Q: {question} A: {answer}'."),
]
Normalize = Annotated[
    list[str] | None,
    option(
        _CHANGE,
        metavar="nfc|nfkc|newlines|strip",
        help="Normalise the text; may be repeated.",
    ),
]
MetadataPrefix = Annotated[
    list[str] | None,
    option(
        _CHANGE,
        metavar="FIELD",
        help="Set this field before the text, between <meta> and </meta>, without loss.",
    ),
]
ControlTokens = Annotated[
    str | None,
    option(
        _CHANGE,
        metavar="BUCKETS",
        help="A token by score, such as 'quality: <|low|> 0.3 <|mid|> 0.7 <|high|>'.",
    ),
]
EngineName = Annotated[
    str,
    option(WORK, metavar="auto|reference|NAME", help="auto takes the fastest that is exact."),
]
UnitBytes = Annotated[
    int,
    option(
        WORK,
        parser=count,
        metavar="BYTES",
        help="Input that one worker takes at a time, and a kill loses at most.",
    ),
]


@app.command(
    epilog="Example: megatron-curr preprocess data/prose.jsonl --tokenizer data/tokenizer.model "
    "--output data/shards/prose"
)
def preprocess(
    inputs: Inputs,
    tokenizer: TokenizerFile,
    output: SourceFolder,
    heldout_frac: HeldoutFrac = 0.02,
    shard_tokens: ShardTokens = 1_000_000_000,
    overwrite: Overwrite = False,
    text_field: TextField = "text",
    metadata: Metadata = None,
    filter_by: Filter = None,
    deduplicate: Deduplicate = False,
    max_document_bytes: MaxDocumentBytes = 32 << 20,
    text_by_line: TextByLine = False,
    max_rejected: MaxRejected = 0.01,
    special_tokens: SpecialTokens = "text",
    bos: Bos = "auto",
    max_unknown: MaxUnknown = 0.01,
    template: Template = None,
    normalize: Normalize = None,
    metadata_prefix: MetadataPrefix = None,
    control_tokens: ControlTokens = None,
    workers: NumWorkers = 2,
    engine: EngineName = "auto",
    unit_bytes: UnitBytes = 64 << 20,
    num_tasks: NumTasks = 1,
    task: TaskNumber = None,
    finish: Finish = False,
    slurm_array: SlurmArray = None,
    profile: ClusterProfile = None,
    as_json: AsJson = False,
) -> None:
    """Tokenize one source into indexed shards; killed, it goes on where it was when run again."""
    given = {
        **locals(),
        "filter": filter_by,
        "max_rejected_frac": max_rejected,
        "max_unknown_frac": max_unknown,
        "num_workers": workers,
    }
    what = {"inputs": inputs, "output": output, "tokenizer": tokenizer, "overwrite": overwrite}
    if slurm_array is None:
        _preprocess_here(given, what, as_json=as_json)
    else:
        _options(given)  # a mistake is told here, not by the jobs
        submit_here(output, profile, num_tasks=slurm_array, cpus=workers)


def _options(given: dict[str, Any]) -> Options:
    """The options among the arguments of the command line, which have the same names."""
    from data_tools.options import Options

    return Options(**_named(given, Options.__slots__))


def _named(given: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    known = ((name, given[name]) for name in names if given[name] is not None)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in known}


def _preprocess_here(given: dict[str, Any], what: dict[str, Any], *, as_json: bool) -> None:
    from data_tools.workers import TEXT_PRELOAD, start_fork_server

    if given["num_workers"] > 1:  # both processes take half a second to load what they need
        start_fork_server(TEXT_PRELOAD)
    from data_tools.preprocess_text import RunSettings
    from data_tools.preprocess_text import preprocess as write_shards

    with told_failure():
        summary = write_shards(
            **what,
            options=_options(given),
            settings=RunSettings(**_named(given, RunSettings.__slots__)),
            show_progress=not as_json,
        )
    typer.echo(summary.json() if as_json else summary.text())


@app.command(
    epilog="Example: megatron-curr train-tokenizer data/prose.jsonl --output data/tokenizer.model"
)
def train_tokenizer(
    inputs: Inputs,
    output: Annotated[
        Path, typer.Option(help="The .model file to write; for bpe a folder in Hugging Face form.")
    ],
    kind: Annotated[
        str, typer.Option(metavar="sentencepiece|bpe", help="bpe is byte-level.")
    ] = "sentencepiece",
    vocab_size: Annotated[
        int, typer.Option(parser=count, metavar="PIECES", help="Such as 8192 or 32k.")
    ] = 8192,
    sample_bytes: Annotated[
        int, typer.Option(parser=count, metavar="BYTES", help="Text to train on.")
    ] = 6_000_000,
    special_token: Annotated[
        list[str] | None, typer.Option(help="One more special token; may be repeated.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="The field that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 1234,
) -> None:
    """Train a tokenizer on a seeded sample: SentencePiece with byte fallback, or byte-level BPE."""
    from data_tools.train_tokenizer import train_tokenizer as train

    made = train(
        inputs,
        output,
        kind=kind,
        vocab_size=vocab_size,
        sample_bytes=sample_bytes,
        special_tokens=special_token or (),
        text_field=text_field,
        seed=seed,
    )
    typer.echo(f"{output}: {made.vocab_size:,} ids, EOD {made.eod_id}")


@app.command(epilog="Example: megatron-curr inspect data/shards/prose/train")
def inspect(
    shards: Shards,
    tokenizer: Annotated[
        str | None, typer.Option(help="To decode with. Default: the one that the manifest names.")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to decode.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    verify: Annotated[bool, typer.Option("--verify", help="Check every checksum too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what shards hold: counts, lengths, metadata, decoded samples."""
    from data_tools.inspect_shards import inspect_shards

    found = inspect_shards(
        shards, tokenizer=tokenizer, num_samples=samples, seed=seed, verify=verify
    )
    typer.echo(found.json() if as_json else found.text())
    raise typer.Exit(1 if found.faults else 0)


@app.command(epilog="Example: megatron-curr verify data/shards/prose/train")
def verify(shards: Shards) -> None:
    """Check the sizes, indexes and sha256 of shards against their manifest."""
    from data_tools.inspect_shards import faults_of

    faults = list(faults_of(shards))
    for fault in faults:
        typer.echo(fault)
    if not faults:
        typer.echo(f"{shards}: every file is as it was written")
    raise typer.Exit(1 if faults else 0)


@app.command(
    epilog="Example: megatron-curr merge-shards data/shards/prose/train data/shards/code/train "
    "--output data/shards/both"
)
def merge_shards(
    inputs: Annotated[list[Path], typer.Argument(metavar="SHARDS...", help="Shard folders.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    shard_tokens: ShardTokens = 1_000_000_000,
    workers: Workers = 1,
) -> None:
    """Join the shards of folders that share a tokenizer, document tables included."""
    from data_tools.merge_shards import recut_shards

    with told_failure():
        made = recut_shards(inputs, output, shard_tokens=shard_tokens, num_workers=workers)
    typer.echo(f"{output}: {len(made.shards):,} shards, {made.num_tokens:,} tokens")


@app.command(
    epilog="Example: megatron-curr split-shards data/shards/prose/train --shard-tokens 100M "
    "--output data/shards/prose_small"
)
def split_shards(
    shards: Shards,
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    shard_tokens: ShardTokens,
    workers: Workers = 1,
) -> None:
    """Cut shards to another size; the documents and their order stay."""
    from data_tools.merge_shards import recut_shards

    with told_failure():
        made = recut_shards([shards], output, shard_tokens=shard_tokens, num_workers=workers)
    typer.echo(f"{output}: {len(made.shards):,} shards, {made.num_tokens:,} tokens")
