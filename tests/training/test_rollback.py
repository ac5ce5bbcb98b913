"""Taking a run back: what comes after is as if it had never gone further, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_curr.curriculum.ledger import read_ledger
from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.accounts import read_accounts
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.amend import amend_run
from megatron_curr.training.checkpoint_folder import list_checkpoints
from megatron_curr.training.rollback import roll_back
from megatron_curr.training.run_folder import RunFolder
from tests.training.runs import Runs, newest_tensors, rank_log, rows, tear

BACK, PAST, FROM = 2048, 4608, 2304  # tokens; past is in the second phase
KEEP = {"checkpoint.keep_last": 20, "logging": {"tensorboard": True}}
LOWER = KEEP | {"curriculum.phases.1.learning_rate": {"to": 1e-4, "shape": "cosine"}}
LATER = KEEP | {"curriculum.phases.1.weight_decay": 0.01}


def contents(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def tensorboard_steps(run: Path) -> list[int]:
    """The steps of the loss as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "logs" / "tensorboard"))
    shown.Reload()
    return [event.step for event in shown.Scalars("train/loss_nats_per_token")]


def test_a_run_that_was_rolled_back_is_the_one_that_never_went_past_to_the_bit(runs: Runs) -> None:
    """It had an amendment from a later token as well, which another one then takes the place of."""
    never = runs.train("never", changes=KEEP, stop_at_tokens=BACK)
    amend_run(never, load_recipe(runs.recipe("never", LOWER)), from_tokens=FROM)
    runs.train("never", changes=KEEP)

    run = runs.train("past", changes=KEEP, stop_at_tokens=1024)
    amend_run(run, load_recipe(runs.recipe("past", LATER)), from_tokens=4096)
    runs.train("past", changes=KEEP, stop_at_tokens=PAST)
    before = rows(run)
    assert max(tensorboard_steps(run)) == PAST
    done = roll_back(run, BACK, reason="a spike")
    assert (done.from_tokens, done.to_step, done.amendments_ahead) == (PAST, 8, (4096,))
    assert done.checkpoints == tuple(f"step_000000{n}" for n in ("12", "16", "17"))
    assert rows(run) == [row for row in before if row["consumed_tokens"] <= BACK]
    (aside,) = (run / "logs").glob("metrics_after_2048_*.jsonl")
    cut = [json.loads(line) for line in aside.read_text().splitlines()]
    assert sum("train/loss_nats_per_token" in row for row in cut) == 9
    assert max(tensorboard_steps(run)) == BACK
    accounts = read_accounts(run)
    assert accounts is not None and accounts.lost_tokens == PAST - BACK
    left = sorted(path.name for path in (run / "checkpoints").glob("left-*"))
    assert left == [f"left-{name}" for name in done.checkpoints]

    amend_run(run, load_recipe(runs.recipe("past", LOWER)), from_tokens=FROM)
    runs.train("past", changes=KEEP)  # the recipe as it was at first
    assert f"resumed at token {BACK}, step 8" in rank_log(run).read_text()
    assert rows(run) == rows(never)
    assert rows(run, "eval/time_s") == rows(never, "eval/time_s")
    assert newest_tensors(run) == newest_tensors(never)
    ledger = read_ledger(run / "ledger.jsonl")
    assert [(e.edition.from_tokens, e.rolled_back_from) for e in ledger] == [
        (0, None), (4096, None), (BACK, PAST), (FROM, None),
    ]  # fmt: skip
    assert ledger[2].reason == "a spike"

    roll_back(run, BACK)
    left = [path.name for path in (run / "checkpoints").glob("left*")]
    assert {"left-step_00000012", "left2-step_00000012"} <= set(left)  # none is lost
    runs.train("past", changes=KEEP)
    assert newest_tensors(run) == newest_tensors(never)


def test_what_cannot_be_rolled_back_is_refused_and_left_as_it_is(runs: Runs) -> None:
    run = runs.train("refused", changes=KEEP, stop_at_tokens=PAST)
    tear(run / "checkpoints" / "step_00000008")
    before = contents(run)

    def refused(to_tokens: int, folder: Path = run) -> str:
        with pytest.raises(CheckpointError) as told:
            roll_back(folder, to_tokens)
        return str(told.value)

    message = refused(3000)
    assert "--to 3000: no checkpoint at that token" in message
    assert "1024 (step 4), 2048 (step 8), 3072 (step 12), 4096 (step 16), 4608" in message
    assert "does not match its checksum" in refused(2048)
    assert "stands at token 4,608 already" in refused(PAST)
    assert "no ledger.jsonl, so nothing to roll back" in refused(1024, runs.folder)
    with RunFolder(run).lock():
        assert "already in use by pid" in refused(1024)
    done = roll_back(run, 1024, write=False)
    assert done.checkpoints[0] == "step_00000008" and not done.is_written
    after = contents(run)
    assert {p: c for p, c in after.items() if p.name != "lock"} == {
        p: c for p, c in before.items() if p.name != "lock"
    }
    assert len(list_checkpoints(run / "checkpoints")) == 5
