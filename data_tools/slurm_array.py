"""``--slurm-array N`` of the verbs that preprocess: the same command as N tasks and a last job that
joins what they made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launch.slurm.array import fresh_log_folder, submit_array, verb
from launch.slurm.profile import Profile


def submit_tasks(
    command: Sequence[str], profile: Profile, *, output: Path, num_tasks: int, cpus: int
) -> tuple[str | None, str | None]:
    """Submit the tasks of a command, and the job that joins what they make.

    ``OUTPUT.jobs`` gets what they print. Both job ids. Raises ``UserError`` where there is no Slurm
    or it refuses the job.
    """
    # A task that has nothing left to do ends at once, so all are asked again: files may be mended.
    folder = fresh_log_folder(output)
    *shares, joining = [verb(profile, words) for words in commands_of(command, num_tasks=num_tasks)]
    name = f"preprocess-{output.name}"
    tasks = submit_array(
        shares,
        profile,
        folder=folder / "tasks",
        name=name,
        at_once=num_tasks,
        cpus=cpus,
    )
    finish = submit_array(
        [joining], profile, folder=folder / "finish", name=name, cpus=cpus, after=tasks
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
