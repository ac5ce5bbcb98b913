"""Whether a rank got what its job asked for; every rank looks in its first second."""

from __future__ import annotations

from launch.meeting import Place
from launch.slurm.submission import Submission
from megatron_curr.incarnation.surroundings import Surroundings, spans
from megatron_curr.training.life import RunFailed


class Misplaced(RunFailed):
    """A rank has other neighbours, fewer cores or fewer devices than the job asked for."""

    def __init__(self, check: str, text: str, *, bad_nodes: tuple[str, ...] = ()) -> None:
        super().__init__(text, bad_nodes=bad_nodes)
        self.cause = f"preflight:{check}"


def check_placement(
    place: Place, submission: Submission, around: Surroundings | None = None
) -> None:
    """Raises ``Misplaced`` that names what this rank has and what it should have."""
    around = around or Surroundings.of_this_process()
    who = f"rank {place.rank} on {place.node}"
    wanted = (submission.num_nodes * submission.ranks_per_node, submission.ranks_per_node)
    if (place.world_size, place.local_world_size) != wanted:
        raise Misplaced(
            "ranks",
            f"{who} is one of {place.world_size}, {place.local_world_size} of them on its node; "
            f"the job asked for {wanted[0]}, {wanted[1]} a node. Look for options of the profile "
            "that change tasks",
        )
    cores = min(submission.cpus_per_rank or 1, around.machine_cores)
    if submission.launcher == "torchrun":  # its ranks share what the one task was given
        cores = min(cores * submission.ranks_per_node, around.machine_cores)
    if len(around.cores) < cores:
        raise Misplaced(
            "cores",
            f"{who} may use {len(around.cores)} cores ({spans(around.cores)}) of "
            f"{around.machine_cores}; cpus_per_rank of the profile asks for "
            f"{submission.cpus_per_rank}. Look for what binds it: options or setup of the profile, "
            "SLURM_CPU_BIND, OMP_PROC_BIND",
            bad_nodes=(place.node,),
        )
    # One alone is the rank's own, where Slurm hides the others' from it.
    if submission.has_gpus and len(around.devices) not in (1, *range(wanted[1], 1 << 10)):
        found = ", ".join(around.devices) or "none"
        raise Misplaced(
            "devices",
            f"{who} sees {len(around.devices)} GPUs ({found}); the job asked for {wanted[1]} a "
            "node. Look at gpus and setup of the profile, and at the node",
            bad_nodes=(place.node,),
        )
