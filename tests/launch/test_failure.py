"""Which rank is blamed, and what the user reads: of real ranks on gloo, and of what they left."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from launch.failure import RankEnd, Story, describe, first_failure
from launch.local import Crew

BROKE = "ModelBroke: layer 7 gave up"


@pytest.mark.parametrize(
    ("how", "first_line", "last_line"),
    [
        pytest.param("raises", "rank 1 failed:", BROKE, id="an exception in one rank"),
        pytest.param("alike", "2 ranks failed alike, rank", BROKE, id="in all ranks"),
        pytest.param("exits", "rank 1 failed:", "SystemExit: 3", id="sys.exit"),
        pytest.param(
            "leaves", "rank 1 ended with exit code 0 before the run was over", "", id="os._exit"
        ),
        pytest.param("crashes", "rank 1 was killed by SIGSEGV:", "", id="a crash in C"),
        pytest.param("is killed", "rank 1 was killed by SIGKILL (kill -9, or", "", id="kill -9"),
        pytest.param("dies early", "rank 1 was killed by SIGKILL", "", id="death in start-up"),
    ],
)
def test_the_rank_at_fault_is_named_with_its_own_traceback_and_no_echo(
    how: str, first_line: str, last_line: str, tmp_path: Path
) -> None:
    arguments = [f"file://{tmp_path}/store", str(tmp_path), how]
    began_s = time.monotonic()
    with Crew(arguments, 2, tmp_path, module="tests.end_to_end.failing_rank") as crew:
        outcome = crew.wait()
    assert time.monotonic() - began_s < 45  # nobody waits for the others' time-outs
    assert outcome.code == 1 and outcome.text is not None
    assert outcome.text.startswith(first_line)
    assert outcome.text.rstrip().endswith(last_line)
    assert outcome.text.count("Traceback") == (how in ("raises", "alike", "exits"))
    assert "gloo" not in outcome.text
    if how == "crashes":
        assert "in fail" in outcome.text


def a_story(rank: int, at_s: float, **values: object) -> RankEnd:
    story = Story(rank, at_s, **{"text": "Traceback\nE: no", **values})  # type: ignore[arg-type]
    return RankEnd(rank, 1, at_s, story, "")


def test_blame() -> None:
    echo = a_story(0, 1.0, is_echo=True)
    silent = RankEnd(1, -9, 2.0, None, "")
    left = RankEnd(2, 0, 0.5, None, "")
    own, later = a_story(3, 3.0), a_story(4, 4.0)
    expected = a_story(5, 5.0, is_expected=True)
    assert first_failure([echo]) == echo
    assert first_failure([echo, left]) == left
    assert first_failure([echo, left, silent]) == silent
    assert first_failure([echo, later, own]) == own
    assert first_failure([echo, own, silent]) == silent  # what follows a death may be no echo
    assert first_failure([echo, own, silent, expected]) == expected
    assert describe(expected, [own, expected]) == "Traceback\nE: no"
    assert describe(own, [own, later]).startswith("2 ranks failed alike, rank 3 first:\n")


def test_a_crash_shows_the_stack_of_the_thread_that_crashed() -> None:
    output = (
        "warming up\nFatal Python error: Segmentation fault\n\n"
        'Thread 0x1 (most recent call first):\n  File "a.py", line 1 in waits\n\n'
        'Current thread 0x2 (most recent call first):\n  File "b.py", line 2 in crashes\n\n'
        "Extension modules: yaml"
    )
    end = RankEnd(0, -11, 0.0, None, output)
    assert describe(end, [end]).splitlines() == [
        "rank 0 was killed by SIGSEGV:",
        "Fatal Python error: Segmentation fault",
        "Current thread 0x2 (most recent call first):",
        '  File "b.py", line 2 in crashes',
    ]
