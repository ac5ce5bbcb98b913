"""Conversion as a job array: an element for each checkpoint of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from megatron_curr.convert.run_conversion import run_conversion
from megatron_curr.training.checkpoint_folder import list_checkpoints
from tests.data_tools.text_corpora import everything_in
from tests.slurm.cluster import _PROFILE, Cluster, wait_until


def test_every_checkpoint_is_converted_by_an_element_of_its_own(
    cluster: Cluster, folder: Path, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    run, output = folder / "undisturbed", tmp_path / "bf16"
    checkpoints = list_checkpoints(run / "checkpoints")
    assert len(checkpoints) == 3
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(_PROFILE))
    how = ("--every-checkpoint", "--to", "checkpoint", "--dtype", "bf16")
    command = ("convert", run, output, *how, "--slurm-array", 2, "--profile", profile)
    told = cluster.command(*command)
    assert re.search(r"submitted 3 conversions as array \d+", told)
    marks = [tmp_path / "bf16.jobs" / f"{number}.done" for number in range(3)]
    wait_until(lambda: all(mark.exists() for mark in marks), "all conversions")
    for checkpoint in checkpoints:
        here = tmp_path / "here" / checkpoint.name
        run_conversion(checkpoint, here, to="checkpoint", dtype="bf16")
        assert everything_in(output / checkpoint.name) == everything_in(here)
    assert "every checkpoint is there" in cluster.command(*command)
