"""``megatron-curr submit``: check everything that can be known now, freeze, render, submit."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch.check import check_run
from launch.slurm import client
from launch.slurm.checks import (
    Pace,
    check_cluster,
    check_plan,
    check_run_folder,
    check_slice,
    pace_of,
)
from launch.slurm.environment import left_out
from launch.slurm.exclude import nodes_to_exclude
from launch.slurm.freeze import freeze_code
from launch.slurm.profile import LoadedProfile, load_profile
from launch.slurm.script import render_script
from launch.slurm.submission import Submission, submissions, tell
from megatron_curr.durable import write_durably
from megatron_curr.errors import CheckpointError
from megatron_curr.incarnation.record import incarnations
from megatron_curr.plan.shapes import AnyRecipe
from megatron_curr.recipe.load import dump_recipe, load_recipe


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How the command line wants a run submitted. ``chain``: jobs, None until it is done."""

    num_nodes: int | None = None  # as the profile says
    chain: int | None = 1


@dataclass(frozen=True, kw_only=True)
class Submitted:
    """What became of it; ``job_id`` is None after a dry run, ``unchecked`` what it left out.

    ``finished_tokens`` are those of a run that is through: it gets no job.
    """

    submission: Submission
    script: str
    job_id: str | None = None
    unchecked: str = ""
    finished_tokens: int | None = None

    def as_text(self) -> str:
        """The script alone of a dry run; else where to look and how to end it."""
        if self.finished_tokens is not None:
            folder = shlex.quote(self.submission.run_folder)
            return (
                f"{folder}: the run is finished, at token {self.finished_tokens:,}; nothing was "
                f"submitted. To train it longer: megatron-curr amend {folder} RECIPE, and submit"
            )
        if self.job_id is None:
            return self.script
        submission = self.submission
        folder = shlex.quote(submission.run_folder)
        return (
            f"job {self.job_id} is in the queue: {submission.num_nodes} x "
            f"{submission.ranks_per_node} ranks in {submission.partition}\n"
            f"  watch it   megatron-curr status {folder} --watch\n"
            f"  its output {folder}/logs/slurm-{self.job_id}.out\n"
            f"  end it     scancel --name={submission.name}" + self._left_out()
        )

    def _left_out(self) -> str:
        names = self.submission.left_out
        if not names:
            return ""
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        return f"\n  left here  {shown}: the job takes none of them (inherit of the profile)"

    def as_json(self) -> str:
        """For scripts."""
        return json.dumps(
            {
                **asdict(self.submission),
                "job_id": self.job_id,
                "script": self.script,
                "finished_tokens": self.finished_tokens,
            },
            indent=1,
        )


def submit_run(
    recipe_path: Path, profile_path: Path, overrides: Sequence[str], wish: Wish, *, dry_run: bool
) -> Submitted:
    """Submit a run, or say what would be submitted and write nothing.

    Raises ``UserError`` for whatever would make the job fail that can be seen from here.
    """
    loaded = load_profile(profile_path)
    profile = loaded.values
    num_nodes = wish.num_nodes or profile.nodes
    recipe = load_recipe(recipe_path, overrides)
    recipe = recipe.model_copy(update={"run_folder": recipe.folder.resolve()})
    prepared = check_run(recipe, num_nodes * profile.ranks_per_node)
    for warning in prepared.warnings:
        print(warning, file=sys.stderr)
    check_run_folder(recipe.folder, loaded)
    plan = check_plan(recipe, loaded, num_nodes)
    pace = pace_of(recipe.folder, profile, plan)
    check_slice(loaded, pace)
    unchecked = ""
    try:
        check_cluster(loaded, num_nodes + profile.spares)
        _refuse_second_job(recipe.folder)
    except client.SlurmError as error:
        if not dry_run:
            raise
        unchecked = f"not checked against the cluster: {error}"
    submission = _make_submission(recipe, loaded, num_nodes, wish=wish, pace=pace)
    state = prepared.folder.newest_state()
    if state is not None and state.consumed_tokens >= prepared.schedule.total_tokens:
        return Submitted(submission=submission, script="", finished_tokens=state.consumed_tokens)
    if dry_run:
        script = render_script(submission, profile)
        return Submitted(submission=submission, script=script, unchecked=unchecked)
    submission, script = _freeze(submission, recipe, loaded)
    if plan is not None:
        write_durably(submission.folder / "plan.json", json.dumps(plan.json(), indent=1) + "\n")
    records = [record for i in incarnations(recipe.folder) if (record := i.record)]
    excluded = ",".join(nodes_to_exclude(submission, records))
    options = [f"--exclude={excluded}"] if excluded else []
    job_id = client.submit(submission.script, *options, inherit=submission.inherit)
    tell(submission, "job", id=job_id, excluded=excluded)
    return Submitted(submission=submission, script=script, job_id=job_id)


def job_name(run_folder: Path) -> str:
    """One name for all jobs of a run: a singleton dependency waits for its namesakes."""
    place = hashlib.sha256(str(run_folder.resolve()).encode()).hexdigest()[:8]
    return f"{re.sub('[^A-Za-z0-9_.-]', '_', run_folder.name)}-{place}"


def _make_submission(
    recipe: AnyRecipe, loaded: LoadedProfile, num_nodes: int, *, wish: Wish, pace: Pace
) -> Submission:
    profile, known = loaded.values, submissions(recipe.folder)
    return Submission(
        number=known[-1].number + 1 if known else 1,
        run_folder=str(recipe.folder),
        name=job_name(recipe.folder),
        by=profile.chain.by if wish.chain != 1 else "none",
        max_jobs=wish.chain,
        num_nodes=num_nodes,
        spares=profile.spares,
        ranks_per_node=profile.ranks_per_node,
        launcher=profile.launcher,
        rank_order=profile.rank_order,
        partition=profile.partition,
        min_slice_s=pace.slice_s(profile),
        max_fruitless=profile.chain.max_fruitless,
        restarts_per_job=profile.chain.restarts_per_job,
        exclude_s=profile.chain.exclude_hours * 3600,
        revision=None,
        is_changed=False,
        code=str(recipe.folder / "slurm" / "code" / "frozen"),
        submitted_at_s=time.time(),
        cpus_per_rank=profile.cpus_per_rank,
        has_gpus=profile.gpus != "none",
        inherit=profile.inherit,
        left_out=left_out(os.environ, profile.inherit),
    )


def _freeze(
    planned: Submission, recipe: AnyRecipe, loaded: LoadedProfile
) -> tuple[Submission, str]:
    """Put everything that the jobs read into the run folder."""
    run_folder = Path(planned.run_folder)
    try:
        planned.folder.mkdir(parents=True)
        (run_folder / "logs").mkdir(exist_ok=True)
        frozen = freeze_code(run_folder)
        submission = replace(
            planned,
            revision=frozen.revision,
            is_changed=bool(frozen.difference),
            code=str(frozen.folder),
        )
        script = render_script(submission, loaded.values)
        for name, text in {
            "recipe.yaml": dump_recipe(recipe),
            "profile.yaml": loaded.file.read_text(encoding="utf-8"),
            "code.diff": frozen.difference,
            "train.sbatch": script,
        }.items():
            write_durably(submission.folder / name, text)
        submission.save()
    except OSError as error:
        raise CheckpointError(
            f"{run_folder}: the run folder cannot be written ({error.strerror}: {error.filename}); "
            "set run_folder to a place you may write to, with room on its disk"
        ) from None
    return submission, script


def _refuse_second_job(run_folder: Path) -> None:
    """Raises ``CheckpointError`` where jobs of this run wait or run already."""
    jobs = client.jobs_named(job_name(run_folder))
    if jobs:
        listed = ", ".join(f"{job.job_id} ({job.state.lower()})" for job in jobs)
        raise CheckpointError(
            f"{run_folder}: this run has jobs already: {listed}; watch them with "
            f"megatron-curr status {shlex.quote(str(run_folder))}, or end them with "
            f"scancel --name={job_name(run_folder)}"
        )
    newest = incarnations(run_folder)[-1:]
    claim = newest[0].claim if newest else None
    if claim is None or claim.job_id is None or newest[0].record is not None:
        return
    facts = client.fields_of("job", claim.job_id)
    if facts.get("JobState") in ("RUNNING", "COMPLETING", "SUSPENDED"):
        raise CheckpointError(
            f"{run_folder}: this run folder belongs to job {claim.job_id} "
            f"({facts.get('JobName', 'unnamed')}); wait for it, end it with scancel "
            f"{claim.job_id}, or give this run another name or run_folder"
        )
