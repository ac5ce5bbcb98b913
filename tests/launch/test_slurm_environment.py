"""What reaches a job and its ranks from the shell where submit is typed, and from setup lines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.local import environment_of_rank
from launch.slurm import client
from launch.slurm.environment import for_commands, for_job, left_out
from launch.slurm.script import render
from tests.launch.test_slurm_script import load

LOGIN = {
    "PATH": "/usr/bin",
    "HOME": "/root",
    "SLURM_CONF": "/etc/slurm.conf",
    "MODULEPATH": "/modules",
    "BASH_FUNC_module%%": "() { :; }",
}
STRAY = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "NODE_RANK": "0",
    "MASTER_ADDR": "elsewhere",
    "TORCHELASTIC_RUN_ID": "x",
    "PMI_RANK": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_PROC_BIND": "true",
    "GOMP_CPU_AFFINITY": "0",
    "CUDA_VISIBLE_DEVICES": "0",
    "GLOO_SOCKET_IFNAME": "ib7",
    "PYTHONHOME": "/nowhere",
    "PYTHONPATH": "/nowhere",
    "LD_PRELOAD": "/nowhere.so",
    "BASH_ENV": "/nowhere",
    "TMPDIR": "/nowhere",
    "LC_ALL": "xx_XX",
    "SBATCH_EXPORT": "NONE",
    "SBATCH_PARTITION": "debug",
    "SRUN_CPUS_PER_TASK": "1",
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "64",
    "SLURM_MEM_PER_CPU": "10",
    "LOADEDMODULES": "cuda",
    "http_proxy": "http://proxy",
}


def test_a_job_takes_what_is_named_and_nothing_else() -> None:
    here = {**LOGIN, **STRAY}
    assert for_job(here, []) == LOGIN
    named = {"LD_PRELOAD": "/nowhere.so", "SBATCH_PARTITION": "debug", "SBATCH_EXPORT": "NONE"}
    assert for_job(here, ["LD_PRELOAD", "SBATCH_*"]) == {**LOGIN, **named}
    told = left_out({**here, "EDITOR": "vi", "WANDB_API_KEY": "secret"}, ["LD_PRELOAD"])
    assert {"RANK", "SBATCH_EXPORT", "TMPDIR", "http_proxy", "WANDB_API_KEY"} <= set(told)
    assert {"EDITOR", "LD_PRELOAD", "PATH"}.isdisjoint(told)


def test_the_next_job_of_a_chain_begins_with_the_path_of_the_first() -> None:
    in_a_job = {"PATH": "/env/bin:/usr/bin", "MEGATRON_CURR_SUBMIT_PATH": "/usr/bin"}
    assert for_job(in_a_job, [])["PATH"] == "/usr/bin"


def test_slurms_commands_print_what_is_read_whatever_the_shell_wishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wishes = {"SQUEUE_FORMAT": "%i", "SLURM_TIME_FORMAT": "relative", "SCANCEL_INTERACTIVE": "1"}
    kept = for_commands({**LOGIN, **wishes, "LC_ALL": "de_DE", "EDITOR": "vi"})
    assert kept == {**LOGIN, "LC_ALL": "C", "EDITOR": "vi"}
    for name, value in {**STRAY, **wishes}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("BASH_ENV")  # the stand-ins below are scripts of bash
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for command in ("sbatch", "squeue"):
        (tmp_path / command).write_text('#!/bin/sh\necho "$*"; env\n')
        (tmp_path / command).chmod(0o755)
    asked = client.ask("squeue", "--noheader")
    assert "SQUEUE_FORMAT" not in asked and "SLURM_TIME_FORMAT" not in asked
    line = client.submit(Path("x.sbatch"), "--dependency=singleton", inherit=["TMPDIR"])
    head, *variables = line.splitlines()
    assert head == "--parsable --export=ALL --dependency=singleton x.sbatch"
    assert "TMPDIR=/nowhere" in variables
    assert not [v for v in variables if v.startswith(("RANK=", "SBATCH_", "LD_", "PYTHON", "OMP"))]


def begin(tmp_path: Path, here: dict[str, str] | None = None, **profile: Any) -> tuple[int, str]:
    """The head of a batch script, run by bash; its exit code, and what it leaves as environment."""
    values = {"cpus_per_task": 4, "threads": 4, "code": "/code", "run_folder": str(tmp_path)}
    head = render(
        "environment.sbatch", profile=load(tmp_path, **profile).values, **{**values, "folder": ""}
    )
    done = subprocess.run(
        ["bash"],
        input=f"{head}\nfalse; echo still here; pwd; env",
        env={"PATH": os.environ["PATH"], **(here or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def test_a_script_unsets_what_setup_or_a_site_told_of_ranks(tmp_path: Path) -> None:
    setup = ["export RANK=3 MASTER_PORT=1 SRUN_CPUS_PER_TASK=1 PYTHONPATH=/site TMPDIR=/proc/none"]
    environment = {"SRUN_DEBUG": "1", "NCCL_DEBUG": "a b"}
    code, text = begin(
        tmp_path, {"PMI_RANK": "1", "SLURM_NTASKS": "2"}, setup=setup, environment=environment
    )
    lines = text.splitlines()
    assert code == 0 and lines[:2] == ["still here", str(tmp_path)]
    assert {"SRUN_DEBUG=1", "NCCL_DEBUG=a b", "SLURM_NTASKS=2", "OMP_NUM_THREADS=4"} <= set(lines)
    assert {"PYTHONPATH=/code:/site", "SLURM_EXPORT_ENV=ALL"} <= set(lines)
    gone = ("RANK=", "MASTER_PORT=", "SRUN_CPUS", "PMI_RANK=", "TMPDIR=")
    assert not [line for line in lines if line.startswith(gone)]


def test_setup_may_read_what_is_not_set_and_leave_its_options_on(tmp_path: Path) -> None:
    site = tmp_path / "site.sh"
    site.write_text('if [ -n "$SITE_EXTRA" ]; then export X="$SITE_EXTRA"; fi\n')
    setup = [f"source {site}", "set -euo pipefail", "cd /", 'if [ "$HOME" = x ]; then', "echo x"]
    code, text = begin(tmp_path, {"HOME": "y"}, setup=[*setup, "fi", "export A=\\", "b"])
    assert code == 0 and text.startswith(f"still here\n{tmp_path}\n") and "\nA=b\n" in text


@pytest.mark.parametrize(
    "line", ["module load cuda", "source /does/not/exist", "cd /nowhere", "false", "true && false"]
)
def test_a_setup_line_that_fails_ends_the_job_and_is_named(line: str, tmp_path: Path) -> None:
    code, text = begin(tmp_path, setup=["true", line, "export LATER=1"])
    assert code == 2 and "still here" not in text
    assert "error: a line of the profile's setup ended with exit code" in text
    assert text.splitlines()[-1] == f"mend it; where it may fail, write: {line} || true"
    assert begin(tmp_path, setup=[f"{line} || true"])[0] == 0


@given(
    st.dictionaries(st.sampled_from(sorted({**LOGIN, **STRAY})), st.just("1")), st.integers(1, 4)
)
def test_local_ranks_know_their_own_place_and_share_no_core(
    here: dict[str, str], ranks: int
) -> None:
    for rank in range(ranks):
        found = environment_of_rank(here, rank, ranks)
        place = (found["RANK"], found["WORLD_SIZE"], found["LOCAL_RANK"])
        assert place == (str(rank), str(ranks), str(rank))
        strange = {"NODE_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "PMI_RANK"}
        strange |= {"GLOO_SOCKET_IFNAME"}
        strange |= {"OMP_PROC_BIND", "GOMP_CPU_AFFINITY"} if ranks > 1 else set()
        assert strange.isdisjoint(found)
        assert {"OMP_NUM_THREADS", "PYTHONPATH", "PATH"} & here.keys() <= found.keys()


def test_an_interface_that_is_here_is_kept() -> None:
    here = {"GLOO_SOCKET_IFNAME": "nope,lo", "NCCL_SOCKET_IFNAME": "=lo"}
    assert here.items() <= environment_of_rank(here, 0, 2).items()
    strange = {"GLOO_SOCKET_IFNAME": "ib7", "NCCL_SOCKET_IFNAME": "ib7,ib8"}
    assert strange.keys().isdisjoint(environment_of_rank(strange, 0, 2))
    but = {"NCCL_SOCKET_IFNAME": "^docker"}
    assert but.items() <= environment_of_rank(but, 0, 2).items()


def test_ranks_have_all_cores_where_openmp_has_bound_the_command(tmp_path: Path) -> None:
    """As some library does that the command imports, under OMP_PROC_BIND or GOMP_CPU_AFFINITY."""
    program = (
        "import os, sys, megatron_curr.cli\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from pathlib import Path\n"
        "from launch.local import Crew\n"
        "with Crew([], 2, Path(sys.argv[1]), module='tests.launch.print_cores') as crew:\n"
        "    crew.wait()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    every = f"{sorted(os.sched_getaffinity(0))}\n"
    assert (done.stdout, (tmp_path / "1.out").read_text()) == (every, every)
