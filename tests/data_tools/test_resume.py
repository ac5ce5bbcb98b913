"""Killed anywhere, spread over anything: the bytes are those of one undisturbed run."""

from __future__ import annotations

import fcntl
import gzip
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data_tools import staging as area
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, everything_in, run, small_tokenizer, write_jsonl

HOW = {
    "heldout_frac": 0.2,
    "shard_tokens": 900,
    "unit_bytes": 4_000,
    "metadata": ("id:int",),
    "metadata_prefix": ("id",),
    "deduplicate": True,
    "max_rejected_frac": 0.05,
}


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Large and small files, repetitions and, with ``HOW``, no more bad rows than a run stands."""
    large = write_jsonl(tmp_path / "a.jsonl", TEXTS[:150])
    with large.open("a") as stream:
        stream.write("no json\n" + '{"text": 1}\n')
    small = [write_jsonl(tmp_path / f"b{n}.jsonl", TEXTS[140 + n : 143 + n]) for n in range(30)]
    small_tokenizer()
    return [large, *small]


def in_child(target, *arguments: object) -> int:
    """Run in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def run_and_die(inputs: list[Path], output: Path, event_number: int) -> None:
    """Preprocess, and end by SIGKILL at some file operation."""
    count = 0

    def count_events(event: str, arguments: object) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            count += 1
            if count == event_number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_events)
    run(inputs, output, **HOW)
    os._exit(100 if count < event_number else 0)


def test_killed_at_twenty_points_the_bytes_are_the_same(tmp_path: Path, corpus: list[Path]) -> None:
    run(corpus, tmp_path / "whole" / "prose", **HOW)
    expected = everything_in(tmp_path / "whole" / "prose")
    assert sum(name.endswith(".bin") for name in expected) > 5
    draw = random.Random(5)
    kills, output = 0, tmp_path / "killed" / "prose"
    output.parent.mkdir()
    while kills < 20:
        code = in_child(run_and_die, corpus, output, draw.randrange(30, 500))
        assert code in (-signal.SIGKILL, 100)
        kills += code == -signal.SIGKILL
        if output.exists():
            assert everything_in(output) == expected
            shutil.rmtree(output)
    run(corpus, output, **HOW)
    assert everything_in(output) == expected
    assert [path.name for path in output.parent.iterdir()] == ["prose"]


def test_the_bytes_do_not_depend_on_workers_units_or_tasks(
    tmp_path: Path, corpus: list[Path]
) -> None:
    run(corpus, tmp_path / "1" / "prose", **HOW)
    expected = everything_in(tmp_path / "1" / "prose")
    for num_workers in (2, 4):
        output = tmp_path / str(num_workers) / "prose"
        run(corpus, output, num_workers=num_workers, **HOW)
        assert everything_in(output) == expected
    output = tmp_path / "tasks" / "prose"
    tasks = {"num_tasks": 3, **HOW}
    for task in (2, 0):
        assert run(corpus, output, task=task, **tasks).state == "task done"
    with pytest.raises(DataError, match="run task 1 of --num-tasks 3 again"):
        run(corpus, output, finish=True, **tasks)
    run(corpus, output, task=1, **tasks)
    assert not output.exists()
    run(corpus, output, finish=True, **tasks)
    assert everything_in(output) == expected
    whole = tmp_path / "whole" / "prose"
    run(corpus, whole, **{**HOW, "unit_bytes": 1 << 20})
    shards = {name: content for name, content in expected.items() if "manifest" not in name}
    found = everything_in(whole)
    assert {name: content for name, content in found.items() if "manifest" not in name} == shards


def test_finished_units_are_not_made_again_and_a_mended_file_is(
    tmp_path: Path, corpus: list[Path]
) -> None:
    damaged = tmp_path / "c.jsonl.gz"
    damaged.write_bytes(b"\x1f\x8b\x08\x00 this is no gzip")
    with pytest.raises(DataError, match=r"c\.jsonl\.gz: cannot be read beyond row 0(?s:.)*kept"):
        run([*corpus, damaged], tmp_path / "prose", **HOW)
    damaged.write_bytes(gzip.compress(b'{"text": "mended"}\n'))
    summary = run([*corpus, damaged], tmp_path / "prose", **HOW)
    # All but the units that hold the mended file.
    assert summary.units - 2 <= summary.units_kept < summary.units


KILL_WHOSE_UNIT_IT_IS = """
import glob, os, signal, sys

def die(event, arguments):
    if event == "open" and str(arguments[0]) == {file!r}:
        if glob.glob(f"{units}/*.{{os.getpid()}}.partial"):
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
"""


def test_a_killed_worker_fails_the_command_which_names_the_file_and_goes_on(
    tmp_path: Path, corpus: list[Path]
) -> None:
    last = write_jsonl(tmp_path / "last.jsonl", TEXTS[150:])  # a unit of its own
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        KILL_WHOSE_UNIT_IT_IS.format(file=str(last), units=tmp_path / "prose.partial" / "units")
    )
    command = [sys.executable, "-m", "megatron_curr", "preprocess", *map(str, corpus), str(last)]
    command += ["--tokenizer", str(small_tokenizer().path), "--output", str(tmp_path / "prose")]
    command += ["--workers", "2", "--engine", "reference", "--unit-bytes", "4k"]
    paths = [str(tmp_path / "hook"), *filter(None, sys.path)]
    hooked = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    died = subprocess.run(command, env=hooked, capture_output=True, text=True, check=False)
    assert died.returncode == 1
    assert "error: a worker process died (killed, or out of memory)" in died.stderr
    assert f"while it worked on {last}: nothing was published" in died.stderr
    assert "Traceback" not in died.stderr and died.stdout == ""
    assert not (tmp_path / "prose").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr.count("error")) == (0, 0)
    assert "units were there" in again.stdout
    run([*corpus, last], tmp_path / "whole" / "prose")
    for name, content in everything_in(tmp_path / "whole" / "prose").items():
        if "manifest" not in name:  # which says how large the units were
            assert (tmp_path / "prose" / name).read_bytes() == content


def test_what_a_run_killed_while_tidying_up_left_is_not_taken_for_shards(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "prose"
    with monkeypatch.context() as patched:
        patched.setattr(area, "discard", lambda output: None)
        run(corpus[:1], output, **HOW)
    expected = everything_in(output)
    shutil.rmtree(output)
    run(corpus[:1], output, **HOW)
    assert everything_in(output) == expected


def test_two_runs_at_once_are_refused(tmp_path: Path, corpus: list[Path]) -> None:
    staging = tmp_path / "prose.partial"
    staging.mkdir()
    with open(staging / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is at work"):
            run(corpus, tmp_path / "prose", **HOW)
