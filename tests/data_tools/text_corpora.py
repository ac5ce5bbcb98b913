"""Small corpora and tokenizers, and the one call that preprocesses them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.preprocess_text import Options, RunSettings, Summary, preprocess
from data_tools.train_tokenizer import train_tokenizer
from megatron_curr.data.tokenizer import Tokenizer

TEXTS = [f"Document {number} counts to {number + 3}.\n" * (number % 7 + 1) for number in range(200)]
SPECIAL = ("<meta>", "</meta>", "<|low|>", "<|high|>")


def write_jsonl(path: Path, texts: list[str], **fields: object) -> Path:
    rows = ({"text": text, "id": number, **fields} for number, text in enumerate(texts))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def small_tokenizer(kind: str = "sentencepiece") -> Tokenizer:
    """A tokenizer of 300 ids or fewer with a few special tokens; made once a test process."""
    return _made(kind)


@cache
def _made(kind: str) -> Tokenizer:
    folder = Path(mkdtemp())
    corpus = write_jsonl(folder / "a.jsonl", TEXTS)
    output = folder / ("tokenizer.model" if kind == "sentencepiece" else "bpe")
    return train_tokenizer(
        [corpus],
        output,
        kind=kind,
        vocab_size=300 if kind == "sentencepiece" else 280,
        special_tokens=SPECIAL,
    )


def run(
    inputs: list[Path], output: Path, *, kind: str = "sentencepiece", **settings: object
) -> Summary:
    """Preprocess with options and run settings by name."""
    how = {name: settings.pop(name) for name in RunSettings.__slots__ if name in settings}
    overwrite = bool(settings.pop("overwrite", False))
    return preprocess(
        inputs,
        output,
        tokenizer=small_tokenizer(kind).path,
        options=Options(**settings),
        settings=RunSettings(**{"engine": "reference", **how}),
        overwrite=overwrite,
        show_progress=False,
    )


def marked_as_masked(folder: Path) -> NDArray[np.bool_]:
    """Of each token of a folder's shards, whether the document tables say it carries no loss."""
    marks = []
    for table in sorted(folder.glob("*.documents.parquet")):
        rows = pq.read_table(table).to_pylist()
        marks.append(np.zeros(sum(row["num_tokens"] for row in rows), np.bool_))
        for row in rows:
            marks[-1][row["first_token"] :][: row["masked_tokens"]] = True
    return np.concatenate(marks)


def everything_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
