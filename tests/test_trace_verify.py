"""``trace --verify``: rows whose samples are those of the ledger, and the first one that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_curr.cli import main
from megatron_curr.curriculum.ledger import append_entries, open_ledger
from megatron_curr.data.keyed import digest_of
from megatron_curr.data.loader import Loader
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.schema import Recipe
from megatron_curr.trace import open_trace
from megatron_curr.trace_verify import verify_run
from tests.data.corpora import recipe_dict, write_source


def rows_of_loaders(run: Path, *, dp_size: int, micro_batch_tokens: int) -> list[dict[str, Any]]:
    """The rows of a run whose batches are what real loaders of so many ranks hand out."""
    trace = open_trace(run)
    assert isinstance(trace.recipe, Recipe)
    schedule = trace.schedule
    loaders = [
        Loader(
            trace.recipe,
            schedule,
            trace.order,
            trace.shard_sets,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_tokens=micro_batch_tokens,
        )
        for rank in range(dp_size)
    ]
    rows, clock = [], 0
    while clock < schedule.total_tokens:
        plan = schedule.at(clock)
        batches = [batch for loader in loaders for batch in loader.take(plan)]
        clock = plan.next_consumed_tokens
        rows.append(
            {
                "step": plan.step + 1,
                "consumed_tokens": clock,
                "train/global_batch_tokens": plan.step_tokens,
                "data/samples_digest": digest_of(sum(int(b.identities_B.sum()) for b in batches)),
            }
        )
    for loader in loaders:
        loader.close()
    return rows


def write_rows(run: Path, rows: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("verify")
    write_source(root / "prose", 6000)
    write_source(root / "code", 6000, first_id=500)
    run = root / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe_dict(root), sort_keys=False))
    append_entries(run / "ledger.jsonl", open_ledger(open_trace(run).recipe.curriculum))
    return run, rows_of_loaders(run, dp_size=1, micro_batch_tokens=64)


def test_no_layout_enters_a_digest_and_the_ledger_gives_the_same(
    whole: tuple[Path, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]
) -> None:
    run, rows = whole
    assert rows_of_loaders(run, dp_size=2, micro_batch_tokens=32) == rows
    assert len({row["data/samples_digest"] for row in rows}) == len(rows)
    write_rows(run, rows)
    assert main(["trace", str(run), "--verify"]) == 0
    assert f"{len(rows)} steps agree, tokens 0 to 10,240" in capsys.readouterr().out


def swap(rows: list[dict[str, Any]]) -> None:
    name = "data/samples_digest"
    rows[3][name], rows[4][name] = rows[4][name], rows[3][name]


def shift(rows: list[dict[str, Any]]) -> None:
    rows[3]["consumed_tokens"] += 16


def renumber(rows: list[dict[str, Any]]) -> None:
    rows[3]["step"] = 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap, "by the ledger it is "),
        (shift, "no step: none begins at"),
        (renumber, "step 4, which"),
    ],
)
def test_the_first_step_that_differs_is_named(
    whole: tuple[Path, list[dict[str, Any]]],
    change: Callable[[list[dict[str, Any]]], None],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, rows = whole
    changed = [dict(row) for row in rows]
    change(changed)
    write_rows(run, changed)
    assert main(["trace", str(run), "--verify"]) == 1
    told = capsys.readouterr().out
    assert "3 steps agree, tokens 0 to 384" in told
    assert f"step {changed[3]['step']} differs" in told and said in told


def test_rows_that_are_not_there_and_older_ones_are_told(
    whole: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, rows = whole
    old = {key: value for key, value in rows[5].items() if key != "data/samples_digest"}
    write_rows(run, [*rows[:2], *rows[4:5], old])
    verdict = verify_run(run)
    assert verdict.agrees and verdict.num_steps == 3
    assert "no row for tokens 256 to 512" in verdict.as_text()
    assert "1 steps have no digest" in verdict.as_text()
    write_rows(run, [old])
    assert not verify_run(run).agrees


def test_a_recipe_and_a_run_without_rows_have_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no metrics\.jsonl, so nothing to verify"):
        verify_run(tmp_path)
