"""Profiles and the batch scripts they make."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm.profile import LoadedProfile, load_profile, parse_time_limit
from launch.slurm.script import render_script
from launch.slurm.submission import Submission
from megatron_curr.errors import RecipeError

CLUSTERS = Path(__file__).parents[2] / "configs" / "clusters"
PLAIN = {
    "name": "x",
    "partition": "batch",
    "nodes": 2,
    "ranks_per_node": 4,
    "time_limit": "1:00:00",
}


def load(tmp_path: Path, **values: Any) -> LoadedProfile:
    file = tmp_path / "profile.yaml"
    file.write_text(yaml.safe_dump({**PLAIN, **values}, sort_keys=False))
    return load_profile(file)


def script_of(loaded: LoadedProfile, *, by: str = "singleton") -> str:
    profile = loaded.values
    submission = Submission(
        number=1,
        run_folder="/shared/runs/demo",
        name="demo-1234",
        by=by,
        max_jobs=None,
        num_nodes=profile.nodes,
        spares=profile.spares,
        ranks_per_node=profile.ranks_per_node,
        launcher=profile.launcher,
        rank_order=profile.rank_order,
        partition=profile.partition,
        min_slice_s=60.0,
        max_fruitless=3,
        restarts_per_job=2,
        exclude_s=3600.0,
        revision=None,
        is_changed=False,
        code="/shared/runs/demo/slurm/code/0123",
        submitted_at_s=0.0,
    )
    script = render_script(submission, profile)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "error", "-"], input=script, text=True, check=True)
    return script


def options_of(script: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]


@pytest.mark.parametrize("name", ["bare", "pyxis", "apptainer"])
def test_shipped_profiles_load_and_render(name: str) -> None:
    loaded = load_profile(CLUSTERS / f"{name}.yaml")
    assert loaded.values.name == name
    by = loaded.values.chain.by
    script = script_of(loaded, by=by)
    options = options_of(script)
    assert f"--partition={loaded.values.partition}" in options
    assert ("--requeue" in options) == (by == "requeue") != ("--no-requeue" in options)
    assert shlex.join(["--node-local", f"{loaded.values.node_local}/demo-1234"]) in script
    for variable, value in loaded.values.environment.items():
        assert f"export {variable}={value}" in script


def test_plain_profile_asks_for_what_it_says_and_nothing_else(tmp_path: Path) -> None:
    assert options_of(script_of(load(tmp_path))) == [
        "--job-name=demo-1234",
        "--partition=batch",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--exclusive",
        "--time=0-01:00:00",
        "--signal=USR1@300",
        "--no-requeue",
        "--open-mode=append",
        "--output=/shared/runs/demo/logs/slurm-%j.out",
        "--chdir=/shared/runs/demo",
    ]


def test_every_option_of_a_profile_reaches_slurm(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        account="a",
        qos="q",
        gpus="gres",
        exclusive=False,
        cpus_per_rank=3,
        spares=1,
        options=["--reservation=r"],
        setup=["module load x"],
        environment={"NCCL_DEBUG": "a b"},
    )
    script = script_of(loaded, by="requeue")
    options = options_of(script)
    for option in (
        "--account=a",
        "--qos=q",
        "--nodes=3",
        "--cpus-per-task=3",
        "--gres=gpu:4",
        "--requeue",
        "--no-kill",
        "--reservation=r",
    ):
        assert option in options
    assert "--exclusive" not in options
    assert "\nmodule load x\n" in script and "export NCCL_DEBUG='a b'" in script


def test_torchrun_is_one_task_a_node_and_is_warned_by_the_signal_it_passes_on(
    tmp_path: Path,
) -> None:
    script = script_of(load(tmp_path, launcher="torchrun", cpus_per_rank=2))
    options = options_of(script)
    assert {"--ntasks-per-node=1", "--cpus-per-task=8", "--signal=TERM@300"} <= set(options)
    assert '--node-rank="$SLURM_PROCID"' in script and "--nproc-per-node=4" in script


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_a_nodes_own_disk_is_named_to_the_ranks_who_fill_in_the_variables(
    launcher: str, tmp_path: Path
) -> None:
    script = script_of(load(tmp_path, launcher=launcher, node_local="$TMPDIR/x/"))
    told = "/0001/submission.json --node-local '$TMPDIR/x/demo-1234'\n"
    assert told in script
    assert "--node-local" not in script_of(load(tmp_path, launcher=launcher))


def test_containers_mount_the_run_folder(tmp_path: Path) -> None:
    container = {"engine": "pyxis", "image": "i.sqsh", "mounts": ["/data:/data:ro"]}
    script = script_of(load(tmp_path, container=container, host_python="/usr/bin/python3.11"))
    assert "--container-image=i.sqsh" in script
    assert "--container-mounts=/shared/runs/demo:/shared/runs/demo,/data:/data:ro" in script
    assert "plan=$(/usr/bin/python3.11 -m launch.slurm.job" in script
    script = script_of(load(tmp_path, container={**container, "engine": "apptainer"}))
    command = "apptainer exec --nv --bind /shared/runs/demo:/shared/runs/demo --bind /data:/data:ro"
    assert f"{command} i.sqsh python3 -m launch.worker" in script


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"patrition": "x"}, ":6: patrition: unknown key; did you mean 'partition'?"),
        ({"nodes": 0}, ":3: nodes: found 0; must be greater than 0"),
        ({"time_limit": 3600}, ':5: time_limit: 3600 is no time limit; write "HH:MM:SS"'),
        ({"launcher": "mpirun"}, ":6: launcher: found 'mpirun'; must be 'srun' or 'torchrun'"),
        ({"container": {"engine": "pyxis"}}, "container.image: missing; give it: A squashfs"),
        ({"setup": ["a\nb"]}, "setup.0: found 'a\\nb'"),
        ({"environment": {"RANK": "0"}}, ":6: environment: RANK: set for every rank by"),
        ({"options": ["--export=ALL,A"]}, ":6: options: '--export=ALL,A' names variables; list"),
        ({"inherit": ["A B"]}, ":7: inherit.0: found 'A B'"),
        ({"node_local": "scratch"}, ":6: node_local: 'scratch' is no absolute path; begin it with"),
    ],
)
def test_mistakes_in_a_profile_are_told_with_their_line(
    values: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        load(tmp_path, **values)
    assert expected in str(caught.value)


def test_time_limits_are_read_as_slurm_reads_them() -> None:
    assert parse_time_limit("1-02:03:04") == 93_784
    assert parse_time_limit("4:00:00") == 14_400
    assert parse_time_limit("2-00:00") == 172_800
