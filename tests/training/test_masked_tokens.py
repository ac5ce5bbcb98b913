"""Training and evaluation on preprocessed shards leave out what their document tables mark.

That every layout leaves out the same shows ``test_layouts``, whose second source has such tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_curr.data.shards import ShardWriter, open_shards
from megatron_curr.errors import DataError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.report import build_report
from megatron_curr.training.preflight import prepare
from tests.data_tools.text_corpora import (
    TEXTS,
    marked_as_masked,
    run,
    small_tokenizer,
    write_jsonl,
)
from tests.ranks import run_ranks
from tests.training.runs import Runs, rank_log, rows, train_rank
from tests.training.tiny import SOURCES

STEPS, ROWS, LENGTH = 2, 8, 32


def train_and_count(rank: int, recipe: str, told: str) -> None:
    """Train some steps and write down how many tokens carried loss, by source."""
    from megatron_curr.training.step import Stepper

    counts: dict[str, list[Any]] = {"forward_backward": [], "forward": []}

    def counting(name: str) -> None:
        method = getattr(Stepper, name)

        def counted(self: Stepper, *arguments: Any, **named: Any) -> Any:
            loss = method(self, *arguments, **named)
            counts[name].append(loss.count_by_group)
            return loss

        setattr(Stepper, name, counted)

    for name in counts:
        counting(name)
    train_rank(rank, recipe, 1, STEPS * ROWS * LENGTH)
    Path(told).write_text(json.dumps(counts))


def test_steps_and_evaluations_count_the_tokens_that_are_not_marked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS, quality=0.7)
    sizes = {"heldout_frac": 0.2, "shard_tokens": 2_000}
    run([corpus], data / "prose", metadata_prefix=("id", "quality"), **sizes)
    run([corpus], data / "code", control_tokens="quality: <|low|> 0.5 <|high|>", **sizes)
    changes = {
        "data.tokenizer": str(small_tokenizer().path),
        "curriculum.phases.0.mixture": {"prose": 0.5, "code": 0.5},
    }
    recipe = Runs(data, tmp_path).recipe("run", changes)
    prepared = prepare(load_recipe(recipe), 1)
    run_ranks(train_and_count, 1, str(recipe), str(tmp_path / "counts.json"))
    counts = json.loads((tmp_path / "counts.json").read_text())

    marks = {name: marked_as_masked(data / name / "train") for name in SOURCES}
    assert all(0.01 < marked.mean() < 0.8 for marked in marks.values())
    expected = np.zeros((STEPS, len(SOURCES)), np.int64)
    samples = prepared.order.lookup(np.arange(STEPS * ROWS))
    for number, (source, first) in enumerate(
        zip(samples.source.tolist(), samples.first_token.tolist(), strict=True)
    ):
        labels = marks[prepared.order.sources[source]][first + 1 : first + 1 + LENGTH]
        expected[number // ROWS, source] += LENGTH - labels.sum()
    assert counts["forward_backward"] == expected.tolist()

    wanted = load_recipe(recipe).evaluation.tokens_per_source
    for name, found in zip(sorted(SOURCES), counts["forward"][0], strict=True):
        marked = marked_as_masked(data / name / "heldout")
        labels = min(wanted, open_shards(data / name / "heldout").num_tokens - 1)
        assert found == labels - marked[1 : labels + 1].sum() < labels


def observe_nothing(rank: int, recipe: str) -> None:
    from megatron_curr.training.parity import observe

    with pytest.raises(DataError, match=r"step 0 reads no token that carries loss"):
        observe(prepare(load_recipe(recipe), 1), 1)


def test_steps_and_evaluations_of_nothing_have_no_loss_and_say_so(
    runs: Runs, tmp_path: Path
) -> None:
    for split, end in (("train", 60), ("heldout", 70)):
        with ShardWriter(tmp_path / split, np.dtype(np.uint16)) as writer:
            for _ in range(40):
                tokens = np.append(np.arange(10, end), 2)
                writer.add_documents(tokens, [len(tokens)], masked=np.array([len(tokens)]))
    sources = load_recipe(runs.recipe("any")).model_dump(mode="json")["data"]["sources"]
    silent = {"shards": str(tmp_path / "train"), "heldout": str(tmp_path / "heldout")}
    changes = {
        "data.sources": {**sources, "silent": silent},
        "curriculum.phases.0.tokens": 512,
        "curriculum.phases.0.mixture": {"silent": 1.0},
        "curriculum.phases.0.learning_rate": 1e-3,
    }
    run = runs.train("silent", changes=changes, stop_at_tokens=1024)
    found = rows(run)
    assert [row["train/loss_nats_per_token"] is None for row in found] == [True, True, False]
    assert [row["train/grad_norm"] is None for row in found] == [True, True, False]
    assert "train/silent/loss_nats_per_token" not in found[-1]
    (evaluation,) = rows(run, "eval/time_s")
    assert evaluation["eval/silent/loss_nats_per_token"] is None
    assert evaluation["eval/prose/loss_nats_per_token"] > 5
    log = rank_log(run).read_text()
    assert "silent none (nothing counts)" in log
    assert "256 of 4.61k tokens  loss none (nothing counts)" in log
    run_ranks(observe_nothing, 1, str(runs.folder / "silent.yaml"))
    page = build_report(run)
    assert "In 2 of 3 steps nothing counted" in page
    assert "Nothing that is held out of silent counts" in page
