"""What is refused on a real cluster, each with one message; job arrays; the health of nodes."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_curr.incarnation.record import Claim
from tests.slurm.cluster import ROOT, Cluster, CommandError, SlurmRun, wait_until
from tests.slurm.conftest import NODES
from tests.slurm.toy import write_toy


def refusal(run: SlurmRun, *options: object) -> str:
    with pytest.raises(CommandError) as caught:
        run.submit(*options)
    assert caught.value.code == 2 and "Traceback" not in caught.value.output
    return " ".join(caught.value.output.split())


@pytest.mark.parametrize(
    ("profile", "expected"),
    [
        ({"partition": "bach"}, ":7: partition: the cluster has no partition 'bach'; did you mean"),
        (
            {"nodes": 16},
            f"nodes: 16 nodes are wanted (spares included) and partition batch has {NODES};",
        ),
        ({"options": ["--no-such-option"]}, "sbatch --parsable: sbatch: unrecognized option"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused(
    profile: dict[str, Any], expected: str, cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, write_toy(corpus, tmp_path / "refused"), **profile)
    assert expected in refusal(run)


def test_a_run_has_jobs_of_one_submission_at_a_time(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, write_toy(corpus, tmp_path / "twice"), options=["--hold"])
    first = run.submit()
    message = refusal(run)
    assert f"this run has jobs already: {first} (pending)" in message
    assert f"waiting: job {first} (JobHeldUser)" in cluster.command("status", run.folder)
    cluster("exec", "scancel", f"--name={message.partition('scancel --name=')[2].strip()}")
    assert "ended without output" in cluster.command("status", run.folder)


def test_a_run_folder_of_another_job_is_refused(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    run = SlurmRun(cluster, write_toy(corpus, tmp_path / "taken"))
    wrap = ["--parsable", "--output=/dev/null", "--job-name=stranger", "--wrap=sleep 60"]
    job_id = cluster("exec", "sbatch", *wrap).strip()
    wait_until(lambda: cluster.state_of(job_id) == "RUNNING", "the other job")
    started_s = time.time()
    claim = Claim(
        incarnation=1,
        chain="stranger",
        host="node0",
        pid=1,
        num_ranks=1,
        job_id=job_id,
        launched_at_s=started_s,
        started_at_s=started_s,
        claimed_at_s=started_s,
    )
    (run.folder / "incarnations" / "0001").mkdir(parents=True)
    (run.folder / "incarnations" / "0001" / "claim.json").write_text(claim.to_json())
    assert f"this run folder belongs to job {job_id} (stranger); wait for it" in refusal(run)
    cluster("exec", "scancel", job_id)


def test_a_run_folder_that_nodes_do_not_see_is_named(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    recipe = write_toy(corpus, tmp_path / "unseen", run_folder=str(cluster.folder / "local/this/r"))
    run = SlurmRun(cluster, recipe)
    job_id = run.submit()
    wait_until(lambda: cluster.state_of(job_id) == "FAILED", "the job to fail")
    assert "do all nodes see the run folder?" in cluster.command("status", run.folder)


def test_a_setup_line_that_fails_ends_the_job_and_status_says_which(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    recipe = write_toy(corpus, tmp_path / "set_up")
    run = SlurmRun(cluster, recipe, nodes=1, setup=["module load cuda/99"])
    job_id = run.submit()
    wait_until(lambda: cluster.state_of(job_id) == "FAILED", "the job to fail")
    status = json.loads(cluster.command("status", run.folder, "--json"))["state"]
    assert status.startswith("ended before a rank began: a line of the profile's setup ended with")
    assert "module load cuda/99; see " in status


def test_an_array_runs_each_piece_once_and_again_what_failed(
    cluster: Cluster, tmp_path: Path
) -> None:
    profile = SlurmRun(cluster, write_toy(tmp_path, tmp_path / "unused")).profile
    folder = tmp_path / "array"

    def submit() -> str:
        job_id = cluster("exec", sys.executable, "-m", "tests.slurm.pieces", profile, folder)
        wait_until(lambda: not cluster("exec", "squeue", "-h", "-n", "pieces").strip(), "pieces")
        return job_id.strip()

    assert submit()
    assert sorted(path.name for path in folder.glob("*.done")) == ["0.done", "1.done", "3.done"]
    (folder / "mended").touch()
    assert submit()
    assert (folder / "0.out").read_text() == "piece 0\n"
    assert (folder / "2.out").read_text().endswith("piece 2\n")
    assert not submit()


def test_a_node_that_is_not_fit_is_drained(cluster: Cluster) -> None:
    check = ROOT / "slurm" / "health_check"
    assert cluster("on", 5, check) == ""
    words = ["--drain", "--min-free-gib", 10**7, "--slurm-conf", cluster.folder / "slurm.conf"]
    with pytest.raises(CommandError, match="GiB free on /tmp, not 10000000"):
        cluster("on", 5, "env", "-i", "SLURMD_NODENAME=node5", check, *words)
    cluster.wait_for_node(5, "drained")
    cluster("exec", "scontrol", "update", "nodename=node5", "state=resume")
    cluster.wait_for_node(5, "idle")
