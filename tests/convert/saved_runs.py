"""Runs with a checkpoint of random weights, saved by any layout, without training."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import yaml

from data_tools.train_tokenizer import train_tokenizer
from megatron_curr.data.shards import ShardWriter
from megatron_curr.data.tokenizer import Tokenizer
from megatron_curr.recipe.load import load_recipe
from tests.ranks import run_ranks
from tests.training.tiny import SOURCES, recipe_values

TEXT = "a tensor has rows; a row has  columns:\n\tx = [1, 22, 333]  # naïve café\n"
VOCAB_SIZE = 300  # not a multiple of 128: the embedding is padded


def write_corpus(folder: Path) -> Tokenizer:
    """A byte-fallback tokenizer and held-out shards of two sources."""
    folder.mkdir(parents=True, exist_ok=True)
    words = np.random.default_rng(3).choice(TEXT.split(), 4000)
    lines = folder / "text.jsonl"
    with lines.open("w") as file:
        for start in range(0, len(words), 40):
            file.write(json.dumps({"text": TEXT + " ".join(words[start : start + 40])}) + "\n")
    tokenizer = train_tokenizer([lines], folder / "tokenizer.model", vocab_size=VOCAB_SIZE)
    ids = tokenizer.encode(TEXT)
    for name in SOURCES:
        for split in ("train", "heldout"):
            with ShardWriter(folder / name / split, np.dtype(np.uint16)) as writer:
                for _ in range(40):
                    writer.add_document(np.array([*ids, tokenizer.eod_id]))
    return tokenizer


def save_run(
    corpus: Path,
    run: Path,
    *,
    tp: int = 1,
    pp: int = 1,
    precision: str = "fp32",
    ema_decay: float | None = None,
    **model: object,
) -> Path:
    """A run folder whose one checkpoint holds random weights of this model; returns the run."""
    values = recipe_values(corpus, run)
    values["model"].update(model)
    values["parallel"].update(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        sequence_parallel=tp > 1,
    )
    values["training"].update(precision=precision, ema_decay=ema_decay)
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    run_ranks(_save, tp * pp, str(run))
    rows = [
        {f"eval/{name}/loss_nats_per_token": 4.25 for name in SOURCES} | {"eval/time_s": 0.1},
        {"train/loss_nats_per_token": 4.5, "perf/step_time_s": 0.1},
    ]
    base = {"step": 16, "consumed_tokens": 4096, "time_s": 1.0, "phase": "short"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(base | row) + "\n" for row in rows))
    return run


def _save(rank: int, run: str) -> None:
    import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

    # isort: split
    from megatron_curr.parallel.groups import build_groups
    from megatron_curr.training.build import build_model
    from megatron_curr.training.checkpoint import Checkpointer
    from megatron_curr.training.checkpoint_folder import RunState, SourceState

    recipe = load_recipe(Path(run) / "recipe.yaml")
    groups = build_groups(recipe.parallel)
    chunks, optimizer = build_model(recipe, groups=groups, vocab_size=VOCAB_SIZE)
    for chunk in chunks:
        for name, weight in chunk.named_parameters():
            if weight.dim() == 1:  # norms and biases begin as ones and zeros, which hide swaps
                cut = getattr(weight, "tensor_model_parallel", False)
                seed = hash_name(name) + (groups.tp_rank if cut else 0)
                noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
                weight.data.add_(0.2 * noise)
    sources = {
        name: SourceState(consumed_tokens=count, epochs=count / 8000, num_tokens=8000)
        for name, count in zip(SOURCES, (4096, 0), strict=True)
    }
    state = RunState(
        consumed_tokens=4096,
        step=16,
        optimizer_step=0,
        ledger_head="0" * 64,
        recipe_fingerprint="f" * 16,
        sources=sources,
        nonfinite_steps=0,
        nonfinite_in_a_row=0,
        keep=False,
        layout={"dp": 1, "tp": groups.tp_size, "pp": groups.pp_size, "cp": 1},
        versions={"torch": torch.__version__},
    )
    report = Checkpointer(
        Path(run) / "checkpoints",
        chunks=[chunk.module for chunk in chunks],
        optimizer=optimizer,
        pg_collection=groups.pg_collection,
        settings=recipe.checkpoint,
    ).save(state)
    assert report.error is None, report.error


def hash_name(name: str) -> int:
    """A seed that is the same in every process."""
    return sum((place + 1) * ord(letter) for place, letter in enumerate(name)) % 2**31
