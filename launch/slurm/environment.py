"""What goes from the shell where ``submit`` is typed into jobs and to Slurm's commands.

A job that inherited all of that shell would train with its numbers of ranks, its cores and its
libraries. It gets the variables below and those that the profile names; everything else is set
where it is needed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from megatron_curr.incarnation.surroundings import is_any, telling

# Where programs are found and who asks, and what makes ``module`` a command on a node. Which
# modules are loaded stays here: a node that believed it would not load them.
_ALWAYS = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "SLURM_CONF", "SLURM_JWT", "MODULEPATH",
    "MODULESHOME", "MODULES_CMD", "LMOD_CMD", "LMOD_DIR", "LMOD_PKG", "LMOD_ROOT",
    "BASH_FUNC_module%%", "BASH_FUNC_ml%%", "BASH_FUNC__module_raw%%", "MEGATRON_CURR_SUBMIT_PATH",
)  # fmt: skip
# Settings of Slurm's commands, which win over a script's own and change what the commands print.
_OF_COMMANDS = re.compile(
    r"(SLURM|SBATCH|SRUN|SALLOC|SQUEUE|SINFO|SCONTROL|SCANCEL|SACCT|SPRIO|SSTAT)_"
)


def for_job(here: Mapping[str, str], inherit: Sequence[str]) -> dict[str, str]:
    """What a job gets of the environment ``here``. ``inherit`` are names, ``*`` for any letters."""
    taken = {name: here[name] for name in here if is_any(name, (*_ALWAYS, *inherit))}
    if path := here.get("MEGATRON_CURR_SUBMIT_PATH"):  # in a job: PATH before its setup lines
        taken["PATH"] = path
    return taken


def left_out(here: Mapping[str, str], inherit: Sequence[str]) -> list[str]:
    """Variables of ``here`` that a job does not get and that would change how it runs."""
    return [name for name in telling(here) if name not in for_job(here, inherit)]


def for_commands(here: Mapping[str, str]) -> dict[str, str]:
    """What squeue, scontrol and the like are run with: they print what this package reads."""
    kept = {
        name: value
        for name, value in here.items()
        if name in _ALWAYS or not _OF_COMMANDS.match(name)
    }
    return {**kept, "LC_ALL": "C"}
