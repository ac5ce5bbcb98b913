"""The page says where the time of all starts went, and how much of it was training that counted."""

from __future__ import annotations

from pathlib import Path

from megatron_curr.incarnation.conclude import conclude
from megatron_curr.report import build_report
from tests.incarnation.lives import LAUNCHED_S, an_ending, claimed
from tests.incarnation.test_conclude import a_beat
from tests.report.synthetic import write_run


def test_the_page_has_the_accounts_of_every_start(tmp_path: Path) -> None:
    run = write_run(tmp_path, until_tokens=100_000)
    assert "Where the time went" not in build_report(run)
    incarnation = claimed(run)
    beat = a_beat(lost_s=12.0, lost_tokens=4321)
    (incarnation.folder / "beat.json").write_text(beat.to_json())
    ending = an_ending(0, "signal:SIGUSR1", at_s=LAUNCHED_S + 100)
    (incarnation.folder / "ended.0.json").write_text(ending.to_json())
    conclude(run)
    page = build_report(run)
    assert "Where the time went" in page and "signal:SIGUSR1" in page and "4,321 tokens" in page
    assert "<b>30%</b> of 2 m 40 s" in page  # 60 s of steps less 12 s done again, of 160 s
    assert "48% of the time in which the run had its nodes" in page
