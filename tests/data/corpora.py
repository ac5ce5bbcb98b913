"""Small shards and recipes for the tests of reading."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from megatron_curr.data.shards import ShardWriter
from megatron_curr.recipe.schema import Recipe

MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "vocab_size": 1000,
}


def write_shard(
    prefix: Path,
    documents: Sequence[Sequence[int]],
    dtype: type[np.integer] = np.uint16,
    *,
    masked: Sequence[int] = (),
) -> Path:
    """One shard of these documents, with so many masked tokens at their starts; no manifest."""
    with ShardWriter(prefix, np.dtype(dtype)) as writer:
        for document, count in zip_longest(documents, masked, fillvalue=0):
            writer.add_documents(document, [len(document)], masked=np.array([count]))
    return prefix


def write_source(folder: Path, num_tokens: int, *, first_id: int = 0, num_shards: int = 2) -> Path:
    """Shards whose token ids count up from ``first_id``, modulo 500; documents of 1 to 40."""
    draw = np.random.default_rng(first_id + num_tokens)
    stream = first_id + np.arange(num_tokens) % 500
    cuts = np.sort(draw.integers(0, num_tokens, num_shards - 1))
    for number, part in enumerate(np.split(stream, cuts)):
        ends = np.cumsum(draw.integers(1, 41, len(part) + 1))
        documents = np.split(part, ends[ends < len(part)])
        write_shard(
            folder / f"{folder.name}_{number:05d}", [document.tolist() for document in documents]
        )
    return folder


def recipe_dict(root: Path, **data: Any) -> dict[str, Any]:
    """Two sources of 6,000 tokens under ``root``, three phases, sequence length 16 then 32."""
    sources = {name: {"shards": str(root / name), "max_epochs": 100} for name in ("prose", "code")}
    short = {"name": "short", "tokens": 2048, "seq_length": 16, "learning_rate": 1e-3}
    short |= {"mixture": {"prose": 1.0}, "global_batch_tokens": 128}
    mixed = {"name": "mixed", "tokens": 4096, "seq_length": 32}
    mixed |= {"mixture": {"to": {"prose": 0.5, "code": 0.5}}, "global_batch_tokens": 256}
    return {
        "name": "tiny",
        "model": MODEL,
        "data": {"tokenizer": str(root / "tokenizer.model"), "sources": sources, **data},
        "curriculum": {"phases": [short, mixed, {**mixed, "name": "anneal"}]},
        "parallel": {"micro_batch_tokens": 64},
        "checkpoint": {"every_tokens": 1024},
        "evaluation": {"every_tokens": 1024, "tokens_per_source": 256},
    }


def recipe(root: Path, **data: Any) -> Recipe:
    """``recipe_dict`` as a recipe."""
    return Recipe.model_validate(recipe_dict(root, **data))
