"""A rank that got other neighbours, cores or devices than its job asked for says so at once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.meeting import Place
from launch.slurm.placement import Misplaced, check_placement
from launch.slurm.submission import Submission
from megatron_curr.incarnation.surroundings import Surroundings

PLACE = Place(5, 16, 1, 4, node="node1", job="1.0.0", finds_others_by_slurm=True)
SUBMISSION = Submission(
    number=1,
    run_folder="/runs/x",
    name="x",
    by="singleton",
    max_jobs=None,
    num_nodes=4,
    spares=1,
    ranks_per_node=4,
    launcher="srun",
    rank_order="slurm",
    partition="gpu",
    min_slice_s=1.0,
    max_fruitless=3,
    restarts_per_job=2,
    exclude_s=0.0,
    revision=None,
    is_changed=False,
    code="",
    submitted_at_s=0.0,
    cpus_per_rank=12,
    has_gpus=True,
)
AROUND = Surroundings(
    cores=tuple(range(12, 24)), machine_cores=96, devices=("0", "1", "2", "3"), variables={}
)


def test_what_was_asked_for_is_in_order() -> None:
    check_placement(PLACE, SUBMISSION, AROUND)
    check_placement(PLACE, SUBMISSION, replace(AROUND, devices=("3",)))  # bound to its own
    small = replace(AROUND, cores=(0, 1), machine_cores=2)  # the machine has no more
    check_placement(PLACE, SUBMISSION, small)
    unbound = replace(SUBMISSION, cpus_per_rank=None, has_gpus=False)
    check_placement(PLACE, unbound, replace(AROUND, cores=(7,), devices=()))


@pytest.mark.parametrize(
    ("place", "around", "cause", "text"),
    [
        (
            replace(PLACE, rank=0, world_size=1, local_world_size=1),
            AROUND,
            "ranks",
            "rank 0 on node1 is one of 1, 1 of them on its node; the job asked for 16, 4 a node",
        ),
        (replace(PLACE, local_world_size=8), AROUND, "ranks", "one of 16, 8 of them on its node"),
        (
            PLACE,
            replace(AROUND, cores=(1,)),
            "cores",
            "rank 5 on node1 may use 1 cores (1) of 96; cpus_per_rank of the profile asks for 12",
        ),
        (PLACE, replace(AROUND, devices=()), "devices", "sees 0 GPUs (none); the job asked for 4"),
        (PLACE, replace(AROUND, devices=("0", "2")), "devices", "sees 2 GPUs (0, 2)"),
    ],
)
def test_what_is_missing_is_named_with_the_node(
    place: Place, around: Surroundings, cause: str, text: str
) -> None:
    with pytest.raises(Misplaced) as caught:
        check_placement(place, SUBMISSION, around)
    assert text in str(caught.value)
    assert caught.value.cause == f"preflight:{cause}"
    assert caught.value.bad_nodes == (() if cause == "ranks" else ("node1",))


def test_torchrun_is_given_the_cores_of_its_ranks_together() -> None:
    by_node = replace(SUBMISSION, launcher="torchrun")
    check_placement(PLACE, by_node, replace(AROUND, cores=tuple(range(48))))
    with pytest.raises(Misplaced, match="may use 12 cores"):
        check_placement(PLACE, by_node, AROUND)
