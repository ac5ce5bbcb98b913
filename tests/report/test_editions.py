"""The page says what was amended and rolled back: where, why, and what changed in the recipe."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_curr.curriculum.ledger import amend, append_entries, note_rollback, read_ledger
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.report import build_report
from megatron_curr.report.editions import ledger_rows
from megatron_curr.report.facts import uncounted
from megatron_curr.report.records import read_run
from tests.report.synthetic import DEMO_RECIPE, write_run


def test_amendments_and_rollbacks_are_marked_and_listed_with_their_differences(
    tmp_path: Path,
) -> None:
    first = load_recipe(DEMO_RECIPE)
    heavier = load_recipe(DEMO_RECIPE, ["curriculum.phases.anneal.weight_decay=0.3"])
    lower = load_recipe(DEMO_RECIPE, ["curriculum.phases.anneal.weight_decay=0.2"])
    run = write_run(tmp_path, recipe=first, until_tokens=300_000)
    path = run / "ledger.jsonl"
    assert "Amendments" not in build_report(run)
    schedule = read_run(run).schedule
    early, late = schedule.step_start(100_000), schedule.step_start(200_000)
    ledger = amend(read_ledger(path), heavier.curriculum, from_tokens=late, reason="<more>")
    note = note_rollback(ledger, to_tokens=early, from_tokens=300_000, reason="a spike")
    ledger = amend((*ledger, note), lower.curriculum, from_tokens=early, reason="less")
    append_entries(path, ledger[1:])
    (run / "recipe.yaml").write_text(dump_recipe(lower))

    found = read_run(run)
    taken, back, last = ledger_rows(found)
    assert (taken.at_tokens, taken.mark) == (late, "")
    assert taken.what == "amended; a later one took its place"
    assert (back.at_tokens, back.what) == (early, "rolled back, from token 300,000")
    assert (last.at_tokens, last.what, last.reason) == (early, "amended", "less")
    assert last.changes == ("phases.2.weight_decay: 0.3 → 0.2",)
    page = build_report(run)
    assert "&lt;more&gt;" in page and "a spike" in page
    assert f"<code>{last.changes[0]}</code>" in page
    assert page.count('class="flag amendment"') == 2 * 9  # in every figure over the token clock
    assert page.count(">amended</text>") == 1


def test_losses_of_nothing_are_said_to_be_none(tmp_path: Path) -> None:
    run = write_run(tmp_path, until_tokens=200_000)
    assert uncounted(read_run(run)) == ()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "train/grad_norm" in row]
    for row in rows:
        row.pop("train/code/loss_nats_per_token", None)
        if "eval/code/loss_nats_per_token" in row:
            row["eval/code/loss_nats_per_token"] = None
    for row in steps[:3]:
        row["train/loss_nats_per_token"] = None
    refused = {"train/nonfinite_first_position": 7, "train/loss_nats_per_token": None}
    steps[5].update(refused)  # of another kind, told elsewhere
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = uncounted(read_run(run))
    assert told == (
        f"In 3 of {len(steps)} steps nothing counted: they have no loss and no gradient.",
        "Nothing that was read of code counts: it has no training loss.",
        "Nothing that is held out of code counts: it has no held-out loss.",
    )
    page = build_report(run)
    assert all(sentence in page for sentence in told) and "nan" not in page.lower()
