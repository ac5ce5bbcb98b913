"""``megatron-curr train`` as a user runs it: killed, stopped, refused. Real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_curr.data.shards import ShardWriter
from megatron_curr.incarnation.record import incarnations
from megatron_curr.training.checkpoint_folder import list_checkpoints, read_state
from megatron_curr.training.run_folder import RunFolder
from tests.training.runs import Runs, losses, newest_tensors, rank_log, rows, verified_steps
from tests.training.tiny import write_corpus

TP2 = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    corpus = tmp_path_factory.mktemp("corpus")
    write_corpus(corpus)
    return Runs(corpus, tmp_path_factory.mktemp("runs"))


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_curr", "train", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    def reached() -> bool:
        try:
            return rows(run)[-1]["step"] >= step
        except (OSError, IndexError, ValueError):
            return False

    wait_until(reached, process)


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        assert process.poll() is None, finish(process)
        time.sleep(0.01)


def test_killed_twice_and_resumed_is_the_unbroken_run_to_the_bit(runs: Runs) -> None:
    unbroken = runs.train("unbroken", ranks=2, changes=TP2)
    recipe, run = runs.recipe("killed", TP2), runs.folder / "killed"
    for step in (6, 14):
        process = start(recipe, "--ranks", 2)
        wait_for_step(run, step, process)
        process.kill()
        finish(process)
    code, output = finish(start(recipe, "--ranks", 2))
    assert code == 0, output
    assert "resumed at token" in output
    assert rows(run) == rows(unbroken)
    assert newest_tensors(run) == newest_tensors(unbroken)
    assert verified_steps(run) == len(rows(unbroken))


def test_signals_save_and_end_cleanly_and_one_rank_goes_on(runs: Runs) -> None:
    recipe, run = runs.recipe("terminated", TP2), runs.folder / "terminated"
    process = start(recipe, "--ranks", 2)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process)
    assert code == 128 + signal.SIGTERM, output  # "train && convert" ends here
    assert re.search(r"held out, at token 0: code \d\.\d{4}, prose \d\.\d{4}", output)
    assert "stopped by SIGTERM at token" in output
    assert f"megatron-curr train {run} --ranks 2" in output
    (newest,) = list_checkpoints(run / "checkpoints")[-1:]
    assert read_state(newest).consumed_tokens == rows(run)[-1]["consumed_tokens"] < 8192
    assert rank_log(run, 1).read_text().count("rank 1 of 2") == 1
    process = start(runs.recipe("terminated"))
    wait_for_step(run, 8, process)
    process.send_signal(signal.SIGHUP)
    code, output = finish(process)
    assert code == 128 + signal.SIGHUP, output
    assert (
        "changed since the last start: parallel.tensor_model_parallel_size: was 2, is 1" in output
    )
    assert "stopped by SIGHUP at token" in output
    process = start(runs.recipe("terminated"))
    wait_for_step(run, 14, process)
    process.send_signal(signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert "stopped by SIGINT at token" in output
    code, output = finish(start(runs.recipe("terminated")))
    assert code == 0, output
    assert len(losses(run)) == verified_steps(run) == 24


def test_a_run_under_nohup_outlives_its_terminal(runs: Runs) -> None:
    run = runs.folder / "nohup"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it to its command
    try:
        process = start(runs.recipe("nohup"), "--stop-at", 2048)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_step(run, 2, process)
    process.send_signal(signal.SIGHUP)
    code, output = finish(process)
    assert code == 0, output
    assert "stopped by --stop-at 2048 at token 2048" in output


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGKILL, "error: rank 1 was killed by SIGKILL (kill -9, or the kernel where"),
        (signal.SIGSTOP, "error: rank 0 on .*: \\w+ at step .* takes longer than .* s; it "
                         "stands in .*; rank 1 on .* left no word"),
    ],
)  # fmt: skip
def test_a_rank_that_dies_or_hangs_is_named_with_what_is_saved_and_how_to_go_on(
    number: signal.Signals, told: str, runs: Runs
) -> None:
    name = number.name.lower()
    hanging = {"training.hang_least_s": 4.0, "training.hang_step_multiple": 5.0}
    longer = {"curriculum.phases.0.tokens": 102_400, "checkpoint.every_tokens": 2048}
    process = start(runs.recipe(name, TP2 | hanging | longer), "--ranks", 2)
    run = runs.folder / name
    wait_for_step(run, 9, process)
    wait_until(lambda: bool(list_checkpoints(run / "checkpoints")), process)
    log = run / "logs" / "0001" / "rank_1.log"
    os.kill(int(log.read_text().split("pid ")[1].split()[0]), number)
    code, output = finish(process)
    assert code == 1
    assert re.search(told.replace("(", r"\("), output), output
    assert re.search(r"saved: the checkpoint of step \d+, token [\d,]+", output)
    assert f"to go on: megatron-curr train {run} --ranks 2\n" in output
    assert "Traceback" not in output and "gloo" not in output
    (incarnation,) = incarnations(run)
    assert incarnation.record is not None
    assert incarnation.record.suspect_ranks == (1,)
    assert incarnation.record.detail in output or "rank 1 on" in incarnation.record.detail


def refused(recipe: Path, *arguments: object) -> str:
    """The message of a command that must be refused as wrong input."""
    code, output = finish(start(recipe, *arguments))
    assert code == 2, output
    assert "Traceback" not in output
    return " ".join(output.split())


def bad_shards(folder: Path) -> Path:
    """Shards with something wrong, one kind a name."""
    folder.mkdir()
    for name, tokens in (("truncated", range(9000)), ("foreign", [1]), ("other_ids", [999] * 9000)):
        with ShardWriter(folder / name, np.dtype(np.uint16)) as writer:
            writer.add_document(np.array(tokens) % 300 if name == "truncated" else tokens)
    os.truncate(folder / "truncated.bin", 17_000)
    (folder / "foreign.idx").write_bytes(b"not an index" * 9)
    with ShardWriter(folder / "empty", np.dtype(np.uint16)):
        pass
    return folder


def test_wrong_input_is_told_once_and_nothing_is_written(runs: Runs, tmp_path: Path) -> None:
    bad = bad_shards(tmp_path / "bad")
    code_shards, first = "data.sources.code.shards", "curriculum.phases.0"
    wrong: dict[str, tuple[str, object, str]] = {
        "lost": (code_shards, str(tmp_path / "none"), "none: neither a folder nor a shard"),
        "truncated": (code_shards, str(bad / "truncated"), "truncated.bin: 17,000 bytes, but"),
        "foreign": (code_shards, str(bad / "foreign"), "this is not a Megatron .idx file"),
        "other_ids": (code_shards, str(bad / "other_ids"), "other_ids.bin: token 0 has id 999"),
        "empty": (code_shards, str(bad / "empty"), "not one token: an empty source"),
        "negative": (f"{first}.mixture", {"prose": -1.0}, "weight of 'prose' is -1.0"),
        "zeros": (f"{first}.mixture", {"prose": 0.0}, "every weight is zero"),
        "nan": (f"{first}.mixture", {"prose": float("nan")}, "weight of 'prose' is nan"),
        "no_tokens": (f"{first}.tokens", 0, "curriculum.phases.0.tokens: found 0"),
        "greedy": ("data.sources.prose.max_epochs", 0.01, "more than max_epochs=0.01 times"),
    }
    for name, (path, value, expected) in wrong.items():
        assert expected in refused(runs.recipe(name, {path: value})), name
        assert not (runs.folder / name).exists()
    message = refused(runs.recipe("unfit", TP2), "--ranks", 3)
    assert message.count("3 ranks cannot hold tensor 2") == 1
    assert not (runs.folder / "unfit").exists()


def test_a_folder_in_use_or_of_another_recipe_is_refused(runs: Runs) -> None:
    run = runs.train("taken", stop_at_tokens=1024)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with RunFolder(run).lock():
        message = refused(runs.recipe("taken"))
        assert f"already in use by pid {os.getpid()} on host" in message
    message = refused(runs.recipe("taken", {"seed": 12, "model.num_layers": 2}))
    assert "seed: was 11, is 12" in message and "model.num_layers: was 4, is 2" in message
    assert "What may change on resume: parallel, checkpoint" in message
    lock = run / "lock"
    assert {p: p.read_bytes() for p in before if p != lock} == {
        p: content for p, content in before.items() if p != lock
    }
