"""The record of an incarnation's end, from what its ranks left; and the accounts of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_curr.incarnation.accounts import add_up, read_accounts
from megatron_curr.incarnation.conclude import conclude, find_blame
from megatron_curr.incarnation.record import CAUSES, TIMES, Beat, Ending
from tests.incarnation.lives import LAUNCHED_S, an_ending, claimed

NODES = {f"node{n}": [2 * n, 2 * n + 1] for n in range(4)}
LOST = {"is_echo": True}


def echoes(cause: str, ranks: range | list[int]) -> list[Ending]:
    return [an_ending(rank, cause, **LOST) for rank in ranks]


@pytest.mark.parametrize(
    ("endings", "verdict", "cause", "bad_nodes", "suspects"),
    [
        pytest.param([], "continue", "vanished", (), (), id="nobody left a word"),
        pytest.param([an_ending(0, "complete")], "finished", "complete", (), (0,), id="complete"),
        pytest.param(
            [an_ending(0, "signal:SIGUSR1")], "continue", "signal:SIGUSR1", (), (0,), id="warned"
        ),
        pytest.param([an_ending(0, "stop-at")], "stop", "stop-at", (), (0,), id="stop-at"),
        pytest.param(
            [*echoes("lost-rank", [0, 1, 2, 4, 5, 6, 7])],
            "continue", "lost-rank", (), (3,), id="one rank killed: its node goes on",
        ),
        pytest.param(
            [*echoes("lost-rank", [0, 1, 4, 5, 6, 7])],
            "continue_elsewhere", "lost-rank", ("node1",), (2, 3), id="a node died",
        ),
        pytest.param(
            [*echoes("lost-rank", [0, 1])],
            "continue", "lost-rank", (), tuple(range(2, 8)), id="most are silent: no one is blamed",
        ),
        pytest.param(
            [*echoes("hang", [0, 1, 2, 3, 4, 5])],
            "continue_elsewhere", "hang", ("node3",), (6, 7), id="a node stopped answering",
        ),
        pytest.param(
            [*echoes("hang", [0, 1, 2, 4, 5, 6, 7]), an_ending(3, "hang", at_s=LAUNCHED_S + 500)],
            "continue", "hang", (), (3,), id="one stands elsewhere than in a collective",
        ),
        pytest.param(
            [*echoes("lost-rank", [0, 1]), an_ending(5, "error:ModelBroke", at_s=LAUNCHED_S + 900)],
            "continue", "error:ModelBroke", (), (5,), id="the first that is no echo counts",
        ),
        pytest.param(
            [an_ending(r, "preflight:clock", bad_nodes=("node2",)) for r in range(8)],
            "continue_elsewhere", "preflight:clock", ("node2",), tuple(range(8)), id="bad clock",
        ),
        pytest.param(
            [an_ending(r, "preflight:disk-space") for r in range(8)],
            "stop", "preflight:disk-space", (), tuple(range(8)), id="no node is better",
        ),
        pytest.param([an_ending(3, "wrong-input")], "stop", "wrong-input", (), (3,), id="input"),
        pytest.param([an_ending(0, "fenced")], "stop", "fenced", (), (0,), id="fenced"),
    ],
)  # fmt: skip
def test_blame(
    endings: list[Ending],
    verdict: str,
    cause: str,
    bad_nodes: tuple[str, ...],
    suspects: tuple[int, ...],
) -> None:
    blame = find_blame(sorted(endings, key=lambda e: e.at_s), NODES, began=True)
    assert (blame.verdict, blame.cause) == (verdict, cause)
    assert (blame.bad_nodes, blame.suspect_ranks) == (bad_nodes, suspects)
    assert blame.cause.partition(":")[0] in CAUSES


def a_beat(**changes: object) -> Beat:
    values = {
        "at_s": LAUNCHED_S + 90,
        "step": 7,
        "consumed_tokens": 700,
        "resumed_step": 2,
        "resumed_tokens": 200,
        "saved_step": 5,
        "saved_tokens": 500,
        "times_s": {
            "imports": 5.0,
            "meet": 1.0,
            "load": 10.0,
            "compute": 60.0,
            "save": 4.0,
            "other": 2.0,
        },
        "step_time_s": 12.0,
        "save_s": 3.0,
    }
    return Beat(**{**values, **changes})  # type: ignore[arg-type]


def test_a_record_is_whole_written_once_and_knows_the_last_row(tmp_path: Path) -> None:
    incarnation = claimed(tmp_path)
    (incarnation.folder / "nodes.json").write_text(json.dumps(NODES))
    (incarnation.folder / "beat.json").write_text(a_beat().to_json())
    rows = [{"step": 8, "consumed_tokens": 800, "time_s": LAUNCHED_S + 95}, {"torn": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows)[:-8])
    for ending in echoes("lost-rank", [0, 1, 4, 5, 6, 7]):
        (incarnation.folder / f"ended.{ending.rank}.json").write_text(ending.to_json())
    record = conclude(tmp_path)
    assert record is not None and record.may_continue
    assert (record.step, record.consumed_tokens) == (8, 800)  # later than the beat
    assert (record.resumed_step, record.saved_step, record.saved_tokens) == (2, 5, 500)
    assert record.detail == "rank 0: lost-rank; ranks 2, 3 on node1 left no word"
    assert record.times_s["queue"] == LAUNCHED_S - 1000
    assert sum(record.times_s.values()) == pytest.approx(60 + 107)  # queued, then ran
    assert record.nodes == tuple(NODES)
    late = an_ending(3, "error:Late", at_s=1.0)
    (incarnation.folder / "ended.3.json").write_text(late.to_json())
    assert conclude(tmp_path) == record


def test_a_successor_concludes_for_one_that_vanished(tmp_path: Path) -> None:
    claimed(tmp_path)
    second = claimed(tmp_path)
    record = conclude(tmp_path, claimed(tmp_path))
    assert record is not None and (record.step, record.cause) == (0, "vanished")
    assert second.record is not None and second.record.cause == "vanished"
    assert conclude(tmp_path / "nowhere") is None


def test_accounts_add_up_to_the_wall_clock(tmp_path: Path) -> None:
    for number, lost_s in ((1, 0.0), (2, 12.0)):
        began_s = LAUNCHED_S + 200 * (number - 1)
        incarnation = claimed(tmp_path, launched_at_s=began_s, started_at_s=began_s + 1,
                              claimed_at_s=began_s + 6)  # fmt: skip
        beat = a_beat(at_s=began_s + 90, lost_s=lost_s, lost_tokens=10 * int(lost_s))
        (incarnation.folder / "beat.json").write_text(beat.to_json())
        ending = an_ending(0, "signal:SIGTERM", at_s=began_s + 100)
        (incarnation.folder / "ended.0.json").write_text(ending.to_json())
        conclude(tmp_path)
    accounts = read_accounts(tmp_path)
    assert accounts is not None and set(accounts.times_s) == set(TIMES)
    assert accounts.wall_s == pytest.approx(LAUNCHED_S - 1000 + 300)
    assert sum(accounts.times_s.values()) == pytest.approx(accounts.wall_s)
    assert (accounts.lost_s, accounts.lost_tokens) == (12.0, 120)
    assert accounts.effective_frac == pytest.approx((120 - 12) / 360)
    assert accounts.effective_running_frac == pytest.approx((120 - 12) / 200)
    assert add_up(accounts.records[:1]).lost_s == 0
    assert read_accounts(tmp_path / "nowhere") is None
