"""``--slurm-array N`` of the verbs that preprocess: the same command as N tasks and a last job that
joins what they made.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from launch.slurm.array import submit_array
from launch.slurm.profile import load_profile


def submit_tasks(
    command: Sequence[str], profile: Path, *, output: Path, num_tasks: int, cpus: int
) -> tuple[str | None, str | None]:
    """Submit the tasks of a command, and the job that joins what they make.

    ``OUTPUT.jobs`` gets what they print. Both job ids. Raises ``UserError`` for a profile that is
    wrong and where there is no Slurm or it refuses the job.
    """
    loaded = load_profile(profile).values
    folder = output.with_name(output.name + ".jobs")
    # A task that has nothing left to do ends at once, so all are asked again: files may be mended.
    shutil.rmtree(folder, ignore_errors=True)
    *shares, joining = [
        [loaded.python, "-m", "megatron_curr", *words]
        for words in commands_of(command, num_tasks=num_tasks)
    ]
    name = f"preprocess-{output.name}"
    tasks = submit_array(
        shares,
        loaded,
        folder=folder / "tasks",
        name=name,
        at_once=num_tasks,
        cpus=cpus,
    )
    finish = submit_array(
        [joining], loaded, folder=folder / "finish", name=name, cpus=cpus, after=tasks
    )
    return tasks, finish


def commands_of(command: Sequence[str], *, num_tasks: int) -> list[list[str]]:
    """What each task types, and last what joins their work."""
    shares = [["--task", str(number)] for number in range(num_tasks)]
    return [[*command, "--num-tasks", str(num_tasks), *share] for share in (*shares, ["--finish"])]


def without_options(command: Sequence[str], names: Sequence[str]) -> list[str]:
    """A command line without some options and their values."""
    kept: list[str] = []
    words = iter(command)
    for word in words:
        if word in names:
            next(words, None)
        elif word.partition("=")[0] not in names:
            kept.append(word)
    return kept
