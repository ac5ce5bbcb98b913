"""Preprocessing as a job array: the bytes are those of one process."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from data_tools.preprocess_video import preprocess_video
from data_tools.video_clips import ClipOptions
from data_tools.video_frames import Bucket
from tests.data_tools.text_corpora import (
    TEXTS,
    everything_in,
    run,
    small_tokenizer,
    write_jsonl,
)
from tests.data_tools.video_files import shapes, write_clip
from tests.slurm.cluster import _PROFILE, Cluster, wait_until


def test_three_array_tasks_give_the_bytes_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    how = {"shard_tokens": 900, "unit_bytes": 4_000}
    run([corpus], tmp_path / "one" / "a", **how)
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(_PROFILE))
    output = tmp_path / "a"
    told = cluster.command(
        "preprocess", corpus, "--tokenizer", small_tokenizer().path, "--output", output,
        "--shard-tokens", 900, "--unit-bytes", 4000, "--engine", "reference", "--workers", 1,
        "--slurm-array", 3, "--profile", profile,
    )  # fmt: skip
    assert re.search(r"submitted 3 tasks as array \d+, and \d+, which joins them", told)
    wait_until((tmp_path / "a.jobs" / "finish" / "0.done").exists, "the last job")
    assert everything_in(output) == everything_in(tmp_path / "one" / "a")
    assert len(list((tmp_path / "a.jobs" / "tasks").glob("*.done"))) == 3


def test_clips_by_three_array_tasks_give_the_bytes_of_one_process(
    cluster: Cluster, tmp_path: Path
) -> None:
    folder = tmp_path / "clips"
    folder.mkdir()
    for number in range(33):  # three units
        clip = write_clip(folder / f"{number:02d}.mp4", shapes(number, num_frames=8))
        clip.with_suffix(".txt").write_text("x")
    options = ClipOptions(fps=16.0, heldout_frac=0.25)
    bucket = Bucket("clip", 32, 32, 8)
    preprocess_video([folder], tmp_path / "one" / "a", buckets=[bucket], options=options)
    profile = tmp_path / "profile.yaml"
    profile.write_text(yaml.safe_dump(_PROFILE))
    output = tmp_path / "a"
    told = cluster.command(
        "preprocess-video", folder, "--output", output, "--bucket", "clip=32x32x8", "--fps", 16,
        "--heldout-frac", 0.25, "--slurm-array", 3, "--profile", profile,
    )  # fmt: skip
    assert re.search(r"submitted 3 tasks as array \d+, and \d+, which joins them", told)
    wait_until((tmp_path / "a.jobs" / "finish" / "0.done").exists, "the last job")
    assert everything_in(output) == everything_in(tmp_path / "one" / "a")
    assert not output.with_name("a.partial").exists()
