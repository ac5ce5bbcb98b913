"""Many pieces of work that need no other, as one job array: preprocessing, conversion."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from launch.slurm import client
from launch.slurm.freeze import freeze_code
from launch.slurm.profile import Profile, format_time_limit
from launch.slurm.script import container_words, render


def submit_array(
    commands: Sequence[Sequence[str]],
    profile: Profile,
    *,
    folder: Path,
    name: str,
    at_once: int = 32,
    cpus: int = 1,
    after: str | None = None,
) -> str | None:
    """Run each command on one node of the profile's partition; the job's id.

    ``folder``, on a disk that all nodes see, gets the frozen code, what each element printed and a
    mark for each that ended well. Called again with the same commands, only the others run; None
    when there are none. A command is a list of words, such as ["megatron-curr", "preprocess", ..].
    ``after`` is a job that must end well before any of it starts.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "commands").write_text("".join(f"{shlex.join(words)}\n" for words in commands))
    missing = unfinished(folder)
    if not missing:
        return None
    script = folder / "array.sbatch"
    script.write_text(
        render(
            "array.sbatch",
            profile=profile,
            name=name,
            cpus_per_task=cpus,
            threads=cpus,
            time_limit=format_time_limit(profile.time_limit),
            run_folder=folder,
            code=freeze_code(folder).folder,
            container=container_words(profile.container, folder, has_gpus=False),
        )
    )
    elements = ",".join(map(str, missing))
    dependency = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    options = [f"--array={elements}%{at_once}", *dependency]
    return client.submit(script, *options, inherit=profile.inherit)


def fresh_log_folder(output: Path) -> Path:
    """``OUTPUT.jobs``, without what is in it: its marks count the commands of another call."""
    folder = output.with_name(output.name + ".jobs")
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def verb(profile: Profile, words: Sequence[str]) -> list[str]:
    """A command of this package, as a node of the profile types it."""
    return [profile.python, "-m", "megatron_curr", *words]


def unfinished(folder: Path) -> list[int]:
    """The commands of an array that have not ended well, by their place from 0."""
    count = len((folder / "commands").read_text().splitlines())
    return [index for index in range(count) if not (folder / f"{index}.done").exists()]
