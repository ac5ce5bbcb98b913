"""What a long read tells of itself."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from data_tools import progress as progress_module
from data_tools.progress import ReadProgress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_speed_rejects_and_what_is_left_are_told(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    told = io.StringIO()
    monkeypatch.setattr(progress_module, "_LINE_EVERY_S", 0)
    monkeypatch.setattr(
        progress_module,
        "Console",
        lambda stderr: Console(file=told, force_terminal=is_terminal, width=200),
    )
    with ReadProgress("preprocess web", 1_000_000) as progress:
        progress.show(500_000, 20_000, 3)
        progress.advance(num_bytes=1, rejects=1)
        progress.note("tokenizing with a pencil")
    text = told.getvalue()
    for part in ("preprocess web", "MB/s", "tokens/s", "4 rejected", "50%", "with a pencil"):
        assert part in text
    assert (progress.read_bytes, progress.tokens, progress.rejects) == (500_001, 20_000, 4)
    assert is_terminal or "left" in text


def test_nothing_is_told_where_a_script_reads(capsys: pytest.CaptureFixture[str]) -> None:
    with ReadProgress("preprocess web", 10, show=False) as progress:
        progress.show(10, 1, 0)
        progress.note("done")
    assert capsys.readouterr() == ("", "")
