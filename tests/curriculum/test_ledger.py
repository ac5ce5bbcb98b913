"""The ledger: appended only, chained by hashes, and deaf to attempts at the past."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_curr.curriculum.ledger import (
    amend,
    append_entries,
    hold_ledger,
    ledger_schedule,
    note_rollback,
    open_ledger,
    read_ledger,
)
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.phases import Curriculum
from tests.curriculum.curricula import curricula


def one_phase(tokens: int = 6400) -> Curriculum:
    table = {"name": "a", "tokens": tokens, "seq_length": 8, "mixture": {"prose": 1.0}}
    return Curriculum.model_validate(
        {"phases": [{**table, "global_batch_tokens": 64, "learning_rate": 1.0}]}
    )


@given(curricula(), curricula(), st.floats(0, 1))
@settings(max_examples=50)
def test_ledger_read_back_gives_the_same_schedule(tmp_path_factory, first, second, where) -> None:
    ledger = open_ledger(first)
    schedule = ledger_schedule(ledger)
    cut = schedule.step_start(int(where * (schedule.total_tokens - 1)))
    assume(cut < sum(p.tokens for p in second.phases) - 32)
    ledger = amend(ledger, second, from_tokens=cut, reason="more math")
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    append_entries(path, ledger[:1])
    append_entries(path, ledger[1:])
    again = read_ledger(path)
    assert again == ledger
    assert ledger_schedule(again).step_runs == ledger_schedule(ledger).step_runs


@given(curricula(), curricula(), curricula(), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30)
def test_an_amendment_takes_the_place_of_one_that_lies_ahead_and_a_note_changes_nothing(
    tmp_path_factory, first, second, third, where, later
) -> None:
    opened = open_ledger(first)
    schedule = ledger_schedule(opened)
    last = schedule.total_tokens - 1
    early, late = sorted(schedule.step_start(int(frac * last)) for frac in (where, later))
    ends = (sum(phase.tokens for phase in curriculum.phases) for curriculum in (second, third))
    assume(early < late < min(ends) - 32)
    ledger = amend(opened, second, from_tokens=late, reason="ahead")
    note = note_rollback(ledger, to_tokens=early, from_tokens=late, reason="a spike")
    noted = (*ledger, note)
    assert ledger_schedule(noted).step_runs == ledger_schedule(ledger).step_runs
    replaced = amend(noted, third, from_tokens=early, reason="lower")
    never = ledger_schedule(amend(opened, third, from_tokens=early, reason="lower"))
    path = tmp_path_factory.mktemp("run") / "ledger.jsonl"
    append_entries(path, replaced)
    assert read_ledger(path) == replaced
    found = ledger_schedule(read_ledger(path))
    assert repr((found.planned, found.step_runs)) == repr((never.planned, never.step_runs))


def test_edited_past_is_found(tmp_path: Path) -> None:
    ledger = amend(open_ledger(one_phase()), one_phase(12800), from_tokens=640, reason="longer")
    path = tmp_path / "ledger.jsonl"
    append_entries(path, ledger)
    first, second = path.read_text().splitlines()
    row = json.loads(first)
    row["curriculum"]["phases"][0]["learning_rate"] = 2.0
    path.write_text(json.dumps(row) + "\n" + second + "\n")
    with pytest.raises(CheckpointError, match=r"ledger.jsonl:1: .*chain of hashes breaks"):
        read_ledger(path)


def test_removed_line_is_found(tmp_path: Path) -> None:
    ledger = amend(open_ledger(one_phase()), one_phase(12800), from_tokens=640, reason="longer")
    path = tmp_path / "ledger.jsonl"
    append_entries(path, ledger[1:])
    with pytest.raises(CheckpointError, match="chain of hashes breaks"):
        read_ledger(path)


def test_line_torn_while_being_written_never_took_effect(tmp_path: Path) -> None:
    ledger = amend(open_ledger(one_phase()), one_phase(12800), from_tokens=640, reason="longer")
    path = tmp_path / "ledger.jsonl"
    append_entries(path, ledger)
    path.write_text(path.read_text()[:-40])
    assert read_ledger(path) == ledger[:1]


def test_an_entry_after_a_torn_line_takes_its_place_and_carries_its_sources(tmp_path: Path) -> None:
    sources = {"math": {"shards": "data/math", "max_epochs": 2.0}}
    first = open_ledger(one_phase())
    ledger = amend(first, one_phase(12800), from_tokens=640, reason="longer", sources=sources)
    path = tmp_path / "ledger.jsonl"
    append_entries(path, ledger)
    path.write_text(path.read_text()[:-40])
    append_entries(path, ledger[1:])
    assert read_ledger(path) == ledger
    assert read_ledger(path)[1].sources == sources
    assert (
        ledger[1].hash != amend(first, one_phase(12800), from_tokens=640, reason="longer")[1].hash
    )


def append_one(path: Path) -> None:
    with hold_ledger(path):
        ledger = read_ledger(path)
        tokens = ledger[-1].edition.from_tokens + 64
        entry = amend(ledger, one_phase(), from_tokens=tokens, reason=str(os.getpid()))[-1]
        append_entries(path, [entry])


def test_processes_that_append_at_once_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    append_entries(path, open_ledger(one_phase()))
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=append_one, args=(path,)) for _ in range(6)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    ledger = read_ledger(path)
    assert [entry.edition.from_tokens for entry in ledger] == [64 * n for n in range(7)]
    assert len({entry.reason for entry in ledger}) == 7


@pytest.mark.parametrize("text", ["", "not json\n", "{}\n", '{"from_tokens": 0}\n'])
def test_damaged_ledger_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"ledger.jsonl"):
        read_ledger(path)
