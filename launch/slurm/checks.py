"""What can be known wrong with a job before it waits in a queue for it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from launch.slurm import client
from launch.slurm.profile import LoadedProfile, Profile, format_time_limit, parse_time_limit
from megatron_curr.data.survey import survey_data
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.incarnation.record import Record, incarnations
from megatron_curr.plan.cluster import Cluster, find_gpu, gpu_names
from megatron_curr.plan.findings import Plan
from megatron_curr.plan.run_plan import plan_run
from megatron_curr.plan.shapes import AnyRecipe
from megatron_curr.recipe.problems import did_you_mean
from megatron_curr.units import format_duration

PREFLIGHT_S = 60.0  # what the checks of the nodes may take
_GIB = 2**30
_MEASURED = 5  # so many of the last starts are looked at
_START = ("launch", "imports", "meet", "load")
_OF_ONE_NODE = {"tmpfs", "ramfs", "squashfs", "iso9660", "devtmpfs"}


def check_cluster(loaded: LoadedProfile, num_nodes: int) -> None:
    """Raises ``RecipeError`` for a partition that is unknown, too small or too short."""
    profile = loaded.values
    known = client.partitions()
    if profile.partition not in known:
        hint = did_you_mean(profile.partition, known, what="partitions")
        raise loaded.refuse(
            "partition", f"the cluster has no partition {profile.partition!r}; {hint}"
        )
    facts = client.fields_of("partition", profile.partition)
    total = int(facts.get("TotalNodes", num_nodes))
    if num_nodes > total:
        raise loaded.refuse(
            "nodes",
            f"{num_nodes} nodes are wanted (spares included) and partition {profile.partition} "
            f"has {total}; ask for {total} or fewer",
        )
    longest_s = _limit_of(facts.get("MaxTime", ""))
    if longest_s is not None and profile.time_limit > longest_s:
        raise loaded.refuse(
            "time_limit",
            f"partition {profile.partition} allows {format_time_limit(longest_s)} at most; "
            "use that and --until-done",
        )


def check_run_folder(run_folder: Path, loaded: LoadedProfile) -> None:
    """Raises ``CheckpointError`` for a run folder that other nodes would not see."""
    shared = [Path(folder) for folder in loaded.values.shared_folders]
    if re.search(r"[\s%'\"\\]", str(run_folder)):
        raise CheckpointError(
            f"{run_folder}: Slurm would misread blanks, quotes, % and \\ in the path of the run "
            "folder; set run_folder to one without them"
        )
    if shared and not any(run_folder.is_relative_to(folder.resolve()) for folder in shared):
        listed = ", ".join(str(folder) for folder in shared)
        raise CheckpointError(
            f"{run_folder}: the run folder must lie on a disk that all nodes share; set run_folder "
            f"to a place under {listed} (shared_folders of {loaded.file})"
        )
    for place in (run_folder, (run_folder / "checkpoints").resolve()):
        kind = _file_system(place)
        if kind in _OF_ONE_NODE:
            raise CheckpointError(
                f"{run_folder}: {place} would lie in {kind}, which only this machine sees; set "
                "run_folder, or let its checkpoints lead, to a place on a disk that all nodes share"
            )


def _file_system(path: Path) -> str:
    """The type of the file system a path is or would be on."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    holding = [
        (len(Path(p).parts), n, t) for n, (p, t) in enumerate(mounts) if path.is_relative_to(p)
    ]
    return max(holding)[2] if holding else "unknown"


@dataclass(frozen=True)
class Pace:
    """Seconds of a start, of a step, of a save: as the run needed them, else what is allowed."""

    start_s: float
    step_s: float
    save_s: float

    def slice_s(self, profile: Profile) -> float:
        """The shortest job that gets as far as one new checkpoint, however early it is warned."""
        asked_to_end_s = profile.signal_before_end_s + profile.signal_slack_s
        return self.start_s + self.step_s + asked_to_end_s


def pace_of(run_folder: Path, profile: Profile, plan: Plan | None) -> Pace:
    """What the last starts of the run measured; before any, what the plan says of it."""
    records = [record for i in incarnations(run_folder) if (record := i.record)][-_MEASURED:]
    trained = [record for record in records if record.step > record.resumed_step]
    if trained:
        return Pace(
            median(_start_s(record) for record in trained),
            median(record.step_time_s or 0.0 for record in trained),
            max(record.save_s or 0.0 for record in trained),
        )
    step_s = max((phase.step_s for phase in plan.phases), default=0.0) if plan else 0.0
    speed = profile.write_gib_per_s
    save_s = plan.checkpoints.bytes_each / (speed * _GIB) if plan and speed else 0.0
    return Pace(PREFLIGHT_S, step_s, save_s)


def check_slice(loaded: LoadedProfile, pace: Pace) -> None:
    """Raises ``RecipeError`` for a time limit in which a run would make no progress."""
    profile = loaded.values
    end_s = pace.step_s + pace.save_s
    if end_s > profile.signal_before_end_s:
        raise loaded.refuse(
            "signal_before_end_s",
            f"the ranks are warned {profile.signal_before_end_s} s before the end, but a step "
            f"takes {format_duration(pace.step_s)} and a save {format_duration(pace.save_s)}; "
            f"set it to {round(1.5 * end_s) + 1} or more",
        )
    needed_s = pace.slice_s(profile)
    if profile.time_limit < needed_s:
        raise loaded.refuse(
            "time_limit",
            f"{format_duration(profile.time_limit)} is too short for the checks of the nodes and "
            f"one checkpoint: the start takes {format_duration(pace.start_s)}, a step "
            f"{format_duration(pace.step_s)}, and Slurm may warn {profile.signal_before_end_s} + "
            f"{profile.signal_slack_s} s before the end, so every job would end where it began; "
            f'set it to "{format_time_limit(60 * (int(needed_s) // 60 + 1))}" or more',
        )


def check_plan(recipe: AnyRecipe, loaded: LoadedProfile, num_nodes: int) -> Plan | None:
    """The plan on the profile's GPUs, where it names them.

    Raises ``RecipeError`` where the run does not fit, with the layouts that would.
    """
    profile = loaded.values
    if profile.gpu is None:
        return None
    if profile.gpu not in gpu_names():
        hint = did_you_mean(profile.gpu, gpu_names(), what="GPUs")
        raise loaded.refuse("gpu", f"the plan has no GPU {profile.gpu!r}; {hint}")
    survey = survey_data(recipe)
    cluster = Cluster(
        num_nodes=num_nodes, gpus_per_node=profile.ranks_per_node, gpu=find_gpu(profile.gpu)
    )
    plan = plan_run(
        recipe,
        cluster,
        vocab_size=survey.vocab_size,
        source_tokens=survey.source_tokens,
        document_tokens=survey.document_tokens,
        remarks=survey.remarks,
    )
    if not plan.fits:
        raise RecipeError(
            f"the run does not fit {num_nodes} x {profile.ranks_per_node} {profile.gpu}:\n"
            + "\n".join(f"  {problem}" for problem in plan.problems)
            + f"\n  The layouts that fit: megatron-curr plan --nodes {num_nodes} "
            f"--gpus-per-node {profile.ranks_per_node} --gpu {profile.gpu}"
        )
    return plan


def _start_s(record: Record) -> float:
    return sum(record.times_s.get(name, 0.0) for name in _START)


def _limit_of(text: str) -> int | None:
    """Seconds of a limit as Slurm prints it; None for none."""
    try:
        return parse_time_limit(text)
    except ValueError:
        return None
