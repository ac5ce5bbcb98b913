"""A tiny corpus, model and recipe: a whole run takes a second or two of computing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import sentencepiece
import yaml

from megatron_curr.data.shards import ShardWriter

VOCAB_SIZE = 320
SOURCES = ("prose", "code")


def write_corpus(folder: Path) -> None:
    """A tokenizer, and shards of two sources whose documents are sequences with a pattern.

    The first tokens of most documents of the second source carry no loss.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "lmnrst"]
    text = folder / "words.txt"
    rng = np.random.default_rng(7)
    text.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(400)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        minloglevel=2,
    )
    for number, name in enumerate(SOURCES):
        for split, num_documents in (("train", 300), ("heldout", 20)):
            with ShardWriter(folder / name / split, np.dtype(np.uint16)) as writer:
                for _ in range(num_documents):
                    length = int(rng.integers(20, 200))
                    start, stride = rng.integers(0, 50, 2)
                    tokens = 10 + (start + (stride + number) * np.arange(length)) % 250
                    masked = np.array([number * (length % 12)])
                    writer.add_documents(np.append(tokens, 2), [length + 1], masked=masked)


def recipe_values(corpus: Path, run_folder: Path) -> dict:
    """Two phases of 16 and 8 steps: 32 then 64 tokens a sample, a ramp of the mixture."""
    return {
        "name": "tiny",
        "seed": 11,
        "run_folder": str(run_folder),
        "model": {
            "num_layers": 4,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "max_position_embeddings": 64,
        },
        "data": {
            "tokenizer": str(corpus / "tokenizer.model"),
            "sources": {
                name: {
                    "shards": str(corpus / name / "train"),
                    "heldout": str(corpus / name / "heldout"),
                }
                for name in SOURCES
            },
        },
        "curriculum": {
            "phases": [
                {
                    "name": "short",
                    "tokens": 4096,
                    "seq_length": 32,
                    "mixture": {"prose": 1.0},
                    "global_batch_tokens": 256,
                    "learning_rate": {"from": 0.0, "to": 3e-3, "over": 1024},
                    "weight_decay": 0.1,
                },
                {
                    "name": "mixed",
                    "tokens": 4096,
                    "seq_length": 64,
                    "mixture": {"to": {"prose": 0.4, "code": 0.6}, "over": 2048},
                    "global_batch_tokens": 512,
                    "learning_rate": {"to": 3e-4, "shape": "cosine"},
                },
            ]
        },
        "parallel": {"micro_batch_tokens": 128},
        "training": {"precision": "fp32"},
        "checkpoint": {"every_tokens": 1024, "keep_last": 2},
        "evaluation": {"every_tokens": 2048, "tokens_per_source": 512},
    }


def write_recipe(path: Path, values: dict) -> Path:
    """The recipe as a YAML file."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path
