"""How the verbs that preprocess share their work out: processes, tasks, a Slurm array."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from launch.slurm.profile import Profile

WORK = "How the work is done"


def option(panel: str, *names: str, **settings: Any) -> Any:
    """An option in its part of the help page."""
    return typer.Option(*names, rich_help_panel=panel, **settings)


NumWorkers = Annotated[int, option(WORK, min=1, help="Processes on this machine.")]
NumTasks = Annotated[int, option(WORK, min=1, help="Share the work among this many.")]
TaskNumber = Annotated[
    int | None, option(WORK, min=0, help="Do the share of this task only, counted from 0.")
]
Finish = Annotated[
    bool, option(WORK, "--finish", help="Join what the tasks made, and do nothing else.")
]
SlurmArray = Annotated[
    int | None,
    option(WORK, min=1, metavar="N", help="Submit this as N Slurm tasks and a job that joins."),
]
ClusterProfile = Annotated[
    Path | None, option(WORK, help="The cluster's profile, in YAML, for --slurm-array.")
]


@contextmanager
def told_failure() -> Iterator[None]:
    """Exit code 1 and one message where a worker died or too much was rejected."""
    from data_tools.workers import WorkFailed

    try:
        yield
    except WorkFailed as failure:
        typer.echo(f"error: {failure}", err=True)
        raise typer.Exit(1) from None


def cluster_profile(profile: Path | None) -> Profile:
    """What ``--profile`` names, which ``--slurm-array`` cannot do without."""
    from launch.slurm.profile import load_profile

    if profile is None:
        raise typer.BadParameter("--slurm-array needs the cluster's --profile")
    return load_profile(profile).values


def submit_here(output: Path, profile: Path | None, *, num_tasks: int, cpus: int) -> None:
    """Submit the command that was typed as so many tasks and a job that joins them."""
    from data_tools.slurm_array import submit_tasks, without_options

    site = cluster_profile(profile)
    command = without_options(sys.argv[1:], ("--slurm-array", "--profile"))
    tasks, finish = submit_tasks(command, site, output=output, num_tasks=num_tasks, cpus=cpus)
    typer.echo(f"submitted {num_tasks} tasks as array {tasks}, and {finish}, which joins them")
