"""Amending a run: what is refused, what is printed, and that a running job obeys, to the bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megatron_curr.curriculum.ledger import hold_ledger, read_ledger
from megatron_curr.data.identity import read_known
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.incarnation.record import incarnations
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.amend import Amendment, amend_run
from tests.training.runs import Runs, losses, newest_tensors, rank_log, rows, verified_steps

LONGER = {
    "curriculum.phases.1.tokens": 6144,
    "curriculum.phases.1.mixture": {"to": {"prose": 0.1, "code": 0.6, "math": 0.3}, "over": 2048},
    "curriculum.phases.1.learning_rate": {"to": 1e-3, "shape": "cosine"},
}
FROM = 4608  # inside the ramp of phase 1


def amended(runs: Runs) -> Path:
    """A recipe with more of everything, and a source that is new."""
    sources = load_recipe(runs.recipe("any")).model_dump(mode="json")["data"]["sources"]
    code, math = (Path(runs.corpus / name / "train") for name in ("code", "math"))
    if not math.parent.exists():
        shutil.copytree(code.parent, math.parent)
        np.roll(np.fromfile(code.with_suffix(".bin"), np.uint16), 1).tofile(
            math.with_suffix(".bin")
        )
    sources["math"] = {**sources["code"], "shards": str(math), "max_epochs": 4.0}
    return runs.recipe("amended", {"data.sources": sources, **LONGER})


def amend(run: Path, recipe: Path, **options: object) -> Amendment:
    return amend_run(run, load_recipe(recipe), **options)  # type: ignore[arg-type]


def test_a_run_amended_while_it_trains_is_the_one_that_was_amended_before(runs: Runs) -> None:
    """Two ranks; a new source, other weights, another rate, a later end, from inside a ramp."""
    before = runs.train("before", ranks=2, stop_at_tokens=1024)
    recipe = amended(runs)
    amend(before, recipe, from_tokens=FROM)
    runs.train("before", ranks=2)  # by the first recipe: the ledger rules
    assert "the run goes on as amended" in rank_log(before).read_text()

    run = runs.folder / "while"
    failures: list[BaseException] = []

    def amend_soon() -> None:
        try:
            while not (run / "metrics.jsonl").exists() or not rows(run):
                time.sleep(0.005)
            done = amend(run, recipe, from_tokens=FROM, reason="more math")
            assert done.is_running and done.is_written
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=amend_soon, daemon=True)
    thread.start()
    runs.train("while", ranks=2)
    thread.join()
    assert failures == []
    assert rows(run)[-1]["consumed_tokens"] == 10240
    assert rows(run)[-1]["data/math/consumed_tokens"] > 0
    assert without_zeros(run) == without_zeros(before)
    assert rows(run, "eval/math/loss_nats_per_token") != []
    assert newest_tensors(run) == newest_tensors(before)
    assert verified_steps(run) == len(rows(run))
    known = read_known(run)
    assert known is not None and len(known.digests["math.shards"]) == 1
    for rank in (0, 1):
        assert f"amended from token {FROM} on (more math)" in rank_log(run, rank).read_text()
    assert [entry.edition.from_tokens for entry in read_ledger(run / "ledger.jsonl")] == [0, FROM]


def without_zeros(run: Path) -> list[dict[str, object]]:
    """Step rows; those of before the amendment know nothing of a source that is yet to come."""
    return [{key: value for key, value in row.items() if value != 0} for row in rows(run)]


def test_a_complete_run_is_made_longer_and_goes_on(runs: Runs) -> None:
    run = runs.train("short")
    longer = runs.recipe("short", {"curriculum.phases.1.tokens": 5120})
    done = amend(run, longer)
    assert (done.from_tokens, done.new_end_tokens, done.is_running) == (8192, 9216, False)
    runs.train("short")  # the recipe as it was at first, too, goes on as amended
    assert (len(losses(run)), rows(run)[-1]["consumed_tokens"]) == (26, 9216)
    assert verified_steps(run) == 26
    assert read_ledger(run / "ledger.jsonl")[-1].edition.from_tokens == 8192


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> Path:
    return runs.train("stopped", stop_at_tokens=2048)


def test_the_past_is_closed_and_so_is_all_but_the_curriculum(runs: Runs, stopped: Path) -> None:
    longer = {"curriculum.phases.1.tokens": 8192}
    before = (stopped / "ledger.jsonl").read_bytes(), (stopped / "recipe.yaml").read_bytes()

    def refused(changes: dict[str, object], **options: object) -> str:
        with pytest.raises((RecipeError, CheckpointError)) as told:
            amend(stopped, runs.recipe("stopped", changes), **options)
        return " ".join(str(told.value).split())

    assert "--from 1024: the past is closed: this run can be amended from token 2048" in refused(
        longer, from_tokens=1024
    )
    assert "changes nothing from token 2,048 on" in refused({})
    assert "changes nothing from token 4,096 on" in refused(
        {"curriculum.phases.0.weight_decay": 0.2, "curriculum.phases.1.weight_decay": 0.1},
        from_tokens=4096,
    )
    assert "seed: was 11, is 12" in refused({**longer, "seed": 12})
    assert "model.num_layers: was 4, is 2" in refused({**longer, "model.num_layers": 2})
    assert "more than max_epochs=4" in refused({"curriculum.phases.1.tokens": 4_000_000})
    with pytest.raises(RecipeError, match=r"mixture.math: no such source in data.sources"):
        load_recipe(runs.recipe("stopped", {"curriculum.phases.1.mixture": {"math": 1.0}}))
    after = (stopped / "ledger.jsonl").read_bytes(), (stopped / "recipe.yaml").read_bytes()
    assert after == before
    with pytest.raises(CheckpointError, match=r"no ledger.jsonl, so nothing to amend"):
        amend(runs.folder, runs.recipe("stopped"))


def test_the_command_prints_the_difference_by_token_and_a_dry_run_writes_nothing(
    runs: Runs, stopped: Path
) -> None:
    changes = {"curriculum.phases.1.learning_rate": 1e-4, "checkpoint.keep_last": 5}
    recipe = runs.recipe("stopped", changes)
    before = (stopped / "ledger.jsonl").read_bytes()
    command = [sys.executable, "-m", "megatron_curr", "amend", str(stopped), str(recipe)]
    told = subprocess.run(
        [*command, "--from", "5k", "--dry-run"], capture_output=True, text=True, check=True
    ).stdout
    assert "from token 5,120 on, where a step begins (--from said 5,000):" in told
    assert "5.12k to 8.19k  learning_rate: 0.002605..0.0004028 -> 0.0001" in told
    assert "left as they are in a running run: checkpoint.keep_last" in told
    done = amend(stopped, recipe, from_tokens=5000, write=False)
    (change,) = json.loads(done.as_json())["changes"]
    assert (change["what"], change["from_tokens"], change["to_tokens"]) == (
        "learning_rate", 5120, 8192,
    )  # fmt: skip
    assert (stopped / "ledger.jsonl").read_bytes() == before


def test_a_job_that_runs_ahead_is_never_amended_behind_its_horizon(runs: Runs) -> None:
    """The job passes the token while the amendment is checked: a later one is taken instead."""
    stopped = runs.train("ahead", stop_at_tokens=2048)
    horizon = incarnations(stopped)[-1].folder / "horizon"
    (horizon.parent / "record.json").unlink()  # as of a run that is not over
    held = horizon.read_text()
    recipe = runs.recipe("ahead", {"curriculum.phases.1.learning_rate": 1e-4})
    done: list[Amendment] = []
    with hold_ledger(stopped / "ledger.jsonl"):
        thread = threading.Thread(target=lambda: done.append(amend(stopped, recipe)), daemon=True)
        thread.start()
        time.sleep(0.5)  # it has been checked for token 2048, and waits for the ledger
        horizon.write_text("2304")
    thread.join()
    horizon.write_text(held)
    assert done[0].from_tokens == 2560
    assert read_ledger(stopped / "ledger.jsonl")[-1].edition.from_tokens == 2560


def test_a_token_past_the_end_is_refused_and_with_extend_taken_for_the_end(runs: Runs) -> None:
    """The second phase ends at a tenth of the rate at which the longer one would stand there."""
    run = runs.train("extended", stop_at_tokens=1024)
    longer = runs.recipe("extended", {"curriculum.phases.1.tokens": 64_000})
    before = (run / "ledger.jsonl").read_bytes()
    with pytest.raises(RecipeError, match=r"--from 20000: the run ends at token 8192, .*--extend"):
        amend(run, longer, from_tokens=20_000)
    assert (run / "ledger.jsonl").read_bytes() == before
    done = amend(run, longer, from_tokens=20_000, extend=True, write=False)
    assert done.from_tokens == 8192
    told = done.as_text()
    assert told.startswith("from token 8,192 on, the end of the run (--from said 20,000):")
    assert "the learning rate leaps at token 8,192, from 0.000403 to 0.00297" in told
    inside = amend(run, longer, from_tokens=5000, write=False).as_text()
    assert inside.startswith("from token 5,120 on, where a step begins (--from said 5,000):")


def test_a_run_that_is_over_can_be_amended_from_its_newest_checkpoint(runs: Runs) -> None:
    """What a start had read beyond it is in no weights, and is read anew."""
    run = runs.train("lost", stop_at_tokens=3072, changes={"checkpoint.keep_last": 9})
    for step in (8, 12):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    lower = runs.recipe("lost", {"curriculum.phases.1.learning_rate": 1e-4})
    assert amend(run, lower).from_tokens == 1024
    runs.train("lost")
    assert rows(run)[-1]["train/learning_rate"] == 1e-4
