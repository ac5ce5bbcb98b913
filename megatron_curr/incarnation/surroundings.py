"""What a process finds around it: the cores it may use, the devices it sees, telling variables.

Needs the standard library only: launchers, ranks and the doctor look with the same eyes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

# What a launcher tells its own ranks. From anywhere else it tells them another job's numbers.
OF_A_LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "NNODES", "NPROC_PER_NODE",
    "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_*", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_*",
    "PET_*", "PMI_*", "PMIX_*", "OMPI_COMM_*", "MV2_COMM_*", "MPI_LOCAL*", "SLURM_STEP_*",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_TASK_PID",
)  # fmt: skip
# What pins threads: to the same cores in every rank that was started with it.
_PINS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_PLACE_THREADS")
_TELLING = (
    *OF_A_LAUNCHER, *_PINS, "SBATCH_*", "SRUN_*", "SALLOC_*", "SLURM_*", "OMPI_*", "TORCH*",
    "PYTORCH_*", "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "OMP_*", "KMP_*", "MKL_*", "ATEN_*", "CUDA_*",
    "CUBLAS_*", "NVTE_*", "NVIDIA_*", "ROCR_*", "PYTHON*", "LD_*", "MALLOC_*", "WANDB_*", "HF_*",
    "APPTAINER*", "SINGULARITY*", "BASH_ENV", "ENV", "TMPDIR", "LC_ALL", "VIRTUAL_ENV",
    "CONDA_PREFIX", "*_proxy", "*_PROXY",
)  # fmt: skip
# Some library loads OpenMP, which then binds this very thread as the variables above say, and what
# it starts inherits that. So the cores are asked for before anything else is imported.
CORES_AT_START = os.sched_getaffinity(0)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|JWT|CREDENTIAL")


def is_any(name: str, patterns: Iterable[str]) -> bool:
    """Whether a variable's name is among these; ``*`` stands for any letters."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_of_a_launcher(name: str) -> bool:
    """Whether a variable holds what only the launcher of this very rank can say."""
    return is_any(name, OF_A_LAUNCHER)


def pins_threads(name: str) -> bool:
    """Whether a variable names the cores of a process's threads."""
    return is_any(name, _PINS)


def telling(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that change how a rank runs, by name; secrets without their value."""
    return {
        name: "(set)" if _SECRET.search(name) else value
        for name, value in sorted(variables.items())
        if is_any(name, _TELLING)
    }


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Of one process."""

    cores: tuple[int, ...]  # that it may use
    machine_cores: int
    devices: tuple[str, ...]  # accelerators that it may use, as its driver would list them
    variables: dict[str, str]  # ``telling``

    @classmethod
    def of_this_process(cls) -> Surroundings:
        """Look around; takes no part of torch, which is slow to come."""
        return cls(
            cores=tuple(sorted(os.sched_getaffinity(0))),
            machine_cores=os.cpu_count() or 1,
            devices=_devices(),
            variables=telling(os.environ),
        )

    def __str__(self) -> str:
        devices = f"devices {','.join(self.devices)}" if self.devices else "no device"
        return f"cores {spans(self.cores)} ({len(self.cores)} of {self.machine_cores}), {devices}"


def _devices() -> tuple[str, ...]:
    """Of CUDA: those that are left visible, else those that the node has."""
    present = [path.name[6:] for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(sorted(present, key=int))
    return tuple(name for name in visible.split(",") if name and name not in ("-1", "NoDevFiles"))


def describe_ranks(
    found: Sequence[tuple[str, Surroundings]],
) -> dict[str, object]:
    """The surroundings of all ranks, with their nodes, as a record: what is common stands once."""
    everywhere = dict.fromkeys(name for _, around in found for name in around.variables)
    common = {}
    for name in everywhere:
        values = {around.variables.get(name) for _, around in found}
        if len(values) == 1:
            common[name] = found[0][1].variables[name]
    ranks = [
        {
            "node": node,
            "cores": spans(around.cores),
            "machine_cores": around.machine_cores,
            "devices": list(around.devices),
            "variables": {k: v for k, v in around.variables.items() if k not in common},
        }
        for node, around in found
    ]
    return {"variables": common, "ranks": ranks}


def crowded_nodes(found: Sequence[tuple[str, Surroundings]]) -> list[str]:
    """A sentence for every node whose ranks may use fewer cores than there are of them."""
    sentences = []
    for node in dict.fromkeys(node for node, _ in found):
        here = [around for name, around in found if name == node]
        cores = sorted({core for around in here for core in around.cores})
        if len(cores) < min(len(here), here[0].machine_cores):
            sentences.append(
                f"{node}: {len(here)} ranks share {len(cores)} of its {here[0].machine_cores} "
                f"cores ({spans(cores)})"
            )
    return sentences


def spans(numbers: Iterable[int]) -> str:
    """``0-3,8`` for 0, 1, 2, 3 and 8."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found)
