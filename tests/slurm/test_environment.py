"""On a Slurm that binds tasks to cores, and typed in a shell full of another job's variables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.slurm.cluster import Cluster, SlurmRun
from tests.slurm.toy import write_toy


def test_ranks_have_the_cores_they_ask_for_and_nothing_of_the_shell(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TASK_PLUGIN", "task/affinity")
    recipe = write_toy(corpus, tmp_path / "bound")
    with TemporaryDirectory(prefix="testcluster-") as folder:
        cluster = Cluster(Path(folder))
        cluster("start", 1)
        try:
            run = SlurmRun(cluster, recipe, nodes=1, ranks_per_node=2, cpus_per_rank=2)
            run.submit()
            run.wait_for_step(1)
            cluster("exec", "scancel", "--user=root")
        finally:
            cluster("stop")
    (file,) = (run.folder / "incarnations").glob("*/surroundings.json")
    found = json.loads(file.read_text())
    assert [rank["node"] for rank in found["ranks"]] == ["node0", "node0"]
    # claims: the machine may have fewer than the 4 that two ranks of 2 would be given
    least = min(2, os.cpu_count() or 1)
    assert all(len(rank["cores"].split("-")) == least for rank in found["ranks"])
    variables = found["variables"]
    assert variables["SLURM_CPUS_PER_TASK"] == "2" and variables["SLURM_STEP_NUM_TASKS"] == "2"
    strange = {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_PROC_BIND", "SBATCH_EXPORT"}
    assert strange.isdisjoint(variables) and variables["MASTER_ADDR"] != "nowhere.invalid"
