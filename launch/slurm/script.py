"""Batch scripts, from the templates in ``slurm/`` and a profile."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.slurm.job import OVER_WELL
from launch.slurm.profile import Container, Profile, format_time_limit
from launch.slurm.submission import Submission
from megatron_curr.incarnation.surroundings import OF_A_LAUNCHER

_PACKAGE = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """``slurm/TEMPLATE`` of the source tree, filled in; a wheel has it as data beside this file."""
    environment = Environment(
        loader=FileSystemLoader([_PACKAGE.parents[1] / "slurm", _PACKAGE / "templates"]),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    # Slurm's own are set anew by srun, and say in a batch script where that runs.
    foreign = [name for name in OF_A_LAUNCHER if not name.startswith("SLURM_")]
    return environment.get_template(template).render(foreign=foreign, **values)


def render_script(submission: Submission, profile: Profile) -> str:
    """The text that sbatch is given for a run."""
    run_folder, has_gpus = Path(submission.run_folder), profile.gpus != "none"
    by_rank, cpus = profile.launcher == "srun", profile.cpus_per_rank
    return render(
        "train.sbatch",
        profile=profile,
        name=submission.name,
        by=submission.by,
        by_rank=by_rank,
        cpus_per_task=cpus and cpus * (1 if by_rank else profile.ranks_per_node),
        threads=cpus,
        over_well=OVER_WELL,
        num_nodes=submission.num_nodes,
        time_limit=format_time_limit(profile.time_limit),
        run_folder=run_folder,
        folder=submission.folder,
        code=submission.code,
        container=container_words(profile.container, run_folder, has_gpus=has_gpus),
        arguments=_arguments(submission, profile),
    )


def _arguments(submission: Submission, profile: Profile) -> str:
    """What the ranks' program is told besides its recipe; variables are the node's, not ours."""
    words = ["--submission", str(submission.file)]
    if profile.node_local is not None:
        words += ["--node-local", f"{profile.node_local}/{submission.name}"]
    return " " + shlex.join(words)


def container_words(container: Container | None, folder: Path, *, has_gpus: bool) -> dict[str, str]:
    """What stands after ``srun``, and what stands before the program; ``folder`` is mounted."""
    if container is None:
        return {"srun": "", "command": ""}
    linked = (folder / "checkpoints").resolve()  # perhaps on a disk of their own
    disks = [folder] if linked.is_relative_to(folder.resolve()) else [folder, linked]
    mounts = [*(f"{disk}:{disk}" for disk in disks), *container.mounts]
    if container.engine == "pyxis":
        options = {
            "container-image": container.image,
            "container-mounts": ",".join(mounts),
            "container-workdir": str(folder),
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        return {"srun": shlex.join(words), "command": ""}
    words = ["apptainer", "exec", *(["--nv"] if has_gpus else [])]
    words += [word for mount in mounts for word in ("--bind", mount)]
    return {"srun": "", "command": shlex.join([*words, container.image]) + " "}
