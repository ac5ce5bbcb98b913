from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import data_tools.preprocess_video as tool
import data_tools.video_units as units
from data_tools.preprocess_video import preprocess_video
from data_tools.slurm_array import commands_of
from data_tools.video_clips import REASONS, ClipOptions
from data_tools.video_frames import Bucket, fit
from data_tools.video_inputs import find_items
from data_tools.workers import Desk
from megatron_curr.cli import main
from megatron_curr.data.codecs import HaarCodec
from megatron_curr.data.video_shards import open_video_shards
from megatron_curr.errors import DataError
from tests.data_tools.video_files import rotate, shapes, write_clip, write_sound

CLIP32, CLIP64, IMAGE = (
    Bucket("clip32", 32, 32, 16),
    Bucket("clip64", 64, 64, 8),
    Bucket("image32", 32, 32, 1),
)
OPTIONS = ClipOptions(fps=16.0, heldout_frac=0.25)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 short clips and 4 pictures: three units."""
    folder = tmp_path_factory.mktemp("media")
    captions = []
    for number in range(40):
        name = f"{number:02d}.png" if number % 10 == 9 else f"{number:02d}.mp4"
        if name.endswith(".png"):
            Image.fromarray(shapes(number, num_frames=1)[0]).save(folder / name)
        else:
            write_clip(folder / name, shapes(number))
        captions.append(json.dumps({"file": name, "caption": f"clip {number}"}) + "\n")
    (folder / "captions.jsonl").write_text("".join(captions))
    return folder


def run(media: Path, output: Path, **options: object) -> tool.Summary:
    settings = {"buckets": [CLIP32, CLIP64, IMAGE], "options": OPTIONS, "show_progress": False}
    return preprocess_video([media], output, **{**settings, **options})


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "shapes"
    run(media, output)
    return output


def test_every_file_is_stored_once_for_each_bucket_it_fits(media: Path, whole: Path) -> None:
    sides = [open_video_shards(whole / split) for split in ("train", "heldout")]
    assert sum(len(side.clips_of("clip32")) for side in sides) == 36
    assert sum(len(side.clips_of("clip64")) for side in sides) == 72  # two clips of 8 frames each
    assert sum(len(side.clips_of("image32")) for side in sides) == 4
    assert min(side.num_samples for side in sides) > 0
    captions = [{side.read(number).caption for number in range(side.num_samples)} for side in sides]
    assert len(captions[0] | captions[1]) == 40 and not captions[0] & captions[1]
    assert (whole / "rejects.jsonl").read_text() == ""
    assert not whole.with_name("shapes.partial").exists()


def test_latents_decode_to_the_clip(whole: Path) -> None:
    shards = open_video_shards(whole / "train")
    first, second = (shards.read(int(number)) for number in shards.clips_of("clip64")[:2])
    assert first.caption == second.caption and (first.fps, second.fps) == (16, 16)
    number = int(first.caption.split()[1])
    frames = HaarCodec().decode(np.concatenate([first.latents_CTYX, second.latents_CTYX], 1))
    assert np.abs(frames.astype(int) - shapes(number)).mean() < 8
    assert second.metadata["first_frame"] == 8


def test_workers_tasks_and_order_of_tasks_change_no_byte(
    media: Path, whole: Path, tmp_path: Path
) -> None:
    run(media, tmp_path / "workers", workers=2)
    for task in (2, 0, 1):
        summary = run(media, tmp_path / "tasks", task=task, num_tasks=3)
        assert summary.state == "task done" and not (tmp_path / "tasks").exists()
    assert run(media, tmp_path / "tasks", finish=True).state == "done"
    assert content(tmp_path / "workers") == content(tmp_path / "tasks") == content(whole)


def test_the_commands_of_an_array_of_three_give_the_bytes_of_one_process(
    media: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["preprocess-video", str(media), "--output", str(tmp_path / "shapes")]
    command += ["--bucket", "clip32=32x32x16", "--bucket", "clip64=64x64x8"]
    command += ["--bucket", "image32=32x32", "--fps", "16", "--heldout-frac", "0.25"]
    *tasks, joining = commands_of(command, num_tasks=3)
    assert len(tasks) == 3
    for words in [*reversed(tasks), joining]:
        assert not (tmp_path / "shapes").exists()
        assert main(words) == 0
    assert content(tmp_path / "shapes") == content(whole)
    # Slurm starts a job again whose node was lost, even one that had ended.
    for words in (tasks[1], joining):
        capsys.readouterr()
        assert main(words) == 0
        assert "already done" in capsys.readouterr().out
    assert not (tmp_path / "shapes.partial").exists()
    assert main([*command, "--slurm-array", "3"]) == 0  # nothing is left to submit
    assert "already done" in capsys.readouterr().out


def test_finishing_before_every_task_is_done_is_refused(media: Path, tmp_path: Path) -> None:
    run(media, tmp_path / "out", task=1, num_tasks=3)
    with pytest.raises(DataError, match=r"2 of 3 units are not done \(0, 2\)"):
        run(media, tmp_path / "out", finish=True)
    with pytest.raises(DataError, match="--task and --finish: give one"):
        run(media, tmp_path / "out", task=0, num_tasks=3, finish=True)


def test_a_killed_run_goes_on_where_it_was(
    media: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "from pathlib import Path; import sys\n"
        "from tests.data_tools.test_preprocess_video import run\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    output = tmp_path / "shapes"
    process = subprocess.Popen([sys.executable, "-c", program, str(media), str(output)], cwd=ROOT)
    units = tmp_path / "shapes.partial" / "units"
    while process.poll() is None and not (units / "000000" / "done.json").is_file():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    written: list[int] = []
    original = tool.write_unit

    def counted(unit: units.Unit, desk: Desk) -> dict[str, int]:
        written.append(unit.number)
        return original(unit, desk)

    monkeypatch.setattr(tool, "write_unit", counted)
    run(media, output)
    assert 0 < len(written) <= 2  # finished units are not done again
    assert content(output) == content(whole)


def test_a_full_disk_leaves_what_was_there_and_the_next_run_goes_on(
    media: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "shapes"
    run(media, output, buckets=[IMAGE])
    before = content(output)
    original = units.sync
    for room in (4, 8):  # in the first unit, and in the second

        def full(path: Path) -> None:
            nonlocal room
            room -= 1
            if room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            original(path)

        with monkeypatch.context() as patched:
            patched.setattr(units, "sync", full)
            with pytest.raises(DataError, match="the disk is full; nothing was published"):
                run(media, output, overwrite=True)
        assert content(output) == before
    finished = tmp_path / "shapes.partial" / "units"
    assert [folder.name for folder in finished.iterdir()] == ["000000"]
    run(media, output, overwrite=True)
    assert content(output) == content(whole)


def test_two_runs_at_once_are_refused(media: Path, tmp_path: Path) -> None:
    run(media, tmp_path / "out", task=0, num_tasks=3)
    with open(tmp_path / "out.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another run is at work"):
            run(media, tmp_path / "out")


def test_rotated_and_varying_clips_are_stored_as_they_are_seen(tmp_path: Path) -> None:
    high = np.ascontiguousarray(shapes(3)[:, :48])
    rotate(write_clip(tmp_path / "turned.mp4", high), 1)
    slow = shapes(4)[:8]
    times = [0, 1, 2, 5, 6, 9, 12, 15]
    write_clip(tmp_path / "varying.webm", slow, times=times)
    for name in ("turned", "varying"):
        (tmp_path / f"{name}.txt").write_text(name)
    options = ClipOptions(fps=16, heldout_frac=0)
    shards_of = tmp_path / "out"
    run(tmp_path, shards_of, buckets=[Bucket("high", 32, 16, 16), CLIP32], options=options)
    shards = open_video_shards(shards_of / "train")
    seen = np.rot90(high, -1, axes=(1, 2))
    shown = slow[np.searchsorted(times, np.arange(16), side="right") - 1]
    for bucket, caption, frames in (
        (Bucket("high", 32, 16, 16), "turned", seen),
        (CLIP32, "varying", shown),
    ):
        clips = map(shards.read, shards.clips_of(bucket.name).tolist())
        latents = next(clip.latents_CTYX for clip in clips if clip.caption == caption)
        expected = np.stack([fit(frame, bucket) for frame in frames])
        through = HaarCodec().decode(HaarCodec().encode(expected))
        assert np.abs(HaarCodec().decode(latents).astype(int) - through).mean() < 3


def test_what_is_not_taken_is_counted_by_reason_and_listed(tmp_path: Path) -> None:
    folder = tmp_path / "media"
    folder.mkdir()
    still, tall = np.repeat(shapes(1)[:1], 16, 0), np.ascontiguousarray(shapes(2)[:, :, :32])
    noise = np.random.default_rng(0).integers(0, 2, (16, 1, 1, 3), np.uint8) * 40
    smooth = np.broadcast_to(noise, (16, 64, 64, 3))
    files = {
        "good.mp4": shapes(0),
        "silent.mp4": shapes(1),  # gets no caption
        "short.mp4": shapes(2)[:4],
        "small.mp4": shapes(3, size=16),
        "tall.mp4": tall,
        "static.mp4": still,
        "blurred.mp4": smooth,
        "odd.mov": np.ascontiguousarray(shapes(6)[:, :61, :59]),
        "turned.mp4": shapes(5),
    }
    for name, frames in files.items():
        write_clip(folder / name, frames)
    rotate(folder / "turned.mp4", 1)
    write_clip(folder / "varying.webm", shapes(4)[:6], times=[0, 1, 4, 6, 9, 15])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "cut.mp4").write_bytes((folder / "good.mp4").read_bytes()[:600])
    write_sound(folder / "sound.mov")
    Image.fromarray(shapes(1)[0]).save(folder / "picture.png")
    for path in folder.iterdir():
        if path.name != "silent.mp4":
            path.with_suffix(".txt").write_text("a shape\n moves")
    summary = run(
        folder,
        tmp_path / "out",
        buckets=[CLIP32],
        options=ClipOptions(fps=16, heldout_frac=0, max_crop_frac=0.3),
    )
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").open()]
    assert {Path(r["file"]).name: r["reason"] for r in rejects} == {
        "silent.mp4": "no_caption",
        "short.mp4": "too_short",
        "small.mp4": "too_small",
        "tall.mp4": "wrong_aspect",
        "static.mp4": "static",
        "blurred.mp4": "blurred",
        "empty.mp4": "unreadable",
        "cut.mp4": "unreadable",
        "sound.mov": "unreadable",
        "picture.png": "no_bucket",
    }
    assert summary.rejects == {**dict.fromkeys(REASONS, 1), "unreadable": 3}
    assert summary.rejects == dict(Counter(r["reason"] for r in rejects))
    assert summary.samples == {"train": {"clip32": 4}}  # good, odd, turned, varying
    assert "not taken: 1 no_caption, 3 unreadable" in summary.text()
    shards = open_video_shards(tmp_path / "out/train")
    assert shards.read(0).caption == "a shape moves"
    assert shards.manifest.options["not_taken"]["unreadable"] == 3


def test_captions_come_from_lists_and_from_beside_the_file(tmp_path: Path) -> None:
    for name in "abcde":
        (tmp_path / f"{name}.mp4").touch()
    rows = [{"video": "a.mp4", "text": "one"}, {"video": "b.mp4", "text": None}]
    (tmp_path / "b.json").write_text('{"text": "two"}')
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "list.csv").write_text('video,text\nc.mp4,"three, and"\n')
    table = pyarrow.table({"video": ["d.mp4"], "text": ["four"]})
    pyarrow.parquet.write_table(table, tmp_path / "list.parquet")
    (tmp_path / "e.txt").write_text("five")
    (tmp_path / "list.txt").write_text("e.mp4\na.mp4\n")
    lists = [tmp_path / f"list{suffix}" for suffix in (".jsonl", ".csv", ".parquet", ".txt")]
    items = find_items(lists, file_field="video", caption_field="text")
    assert [(item.path.name, item.caption) for item in items] == [
        ("a.mp4", "one"),
        ("b.mp4", "two"),
        ("c.mp4", "three, and"),
        ("d.mp4", "four"),
        ("e.mp4", "five"),
    ]
    assert [item.caption for item in find_items([tmp_path], caption_field="text")] == [
        *("", "two", "", "", "five")
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": []}, "no bucket"),
        (
            {"buckets": [Bucket("odd", 40, 32, 16)]},
            r"height 40 makes 5 latents of 8 pixels .* take 32 to 39, or 48",
        ),
        ({"buckets": [Bucket("odd", 32, 32, 12)]}, "num_frames 12: .* take 8, 9 or 16"),
        (
            {"buckets": [Bucket("large", 512, 512, 16)]},
            r"bucket 'large' \(512x512, 16 frames\): not one of 40 .*\(36 too_small, 4 no_bucket\)",
        ),
        ({"buckets": [CLIP32], "task": 3, "num_tasks": 3}, "--task 3: must be from 0 to 2"),
        (
            {"buckets": [CLIP32], "file_field": "path"},
            "row 1: no file in field 'path'; it has file",
        ),
    ],
)
def test_wrong_wishes_are_refused(media: Path, tmp_path: Path, options, message: str) -> None:
    with pytest.raises(DataError, match=message):
        run(media, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_folders_of_others_and_half_done_runs_are_left_alone(media: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match="already there"):
        run(media, tmp_path / "mine")
    with pytest.raises(DataError, match="holds other files than shards of ours"):
        run(media, tmp_path / "mine", overwrite=True)
    run(media, tmp_path / "out", task=0, num_tasks=3)
    with pytest.raises(DataError, match="left by a run with other inputs or options"):
        run(media, tmp_path / "out", buckets=[CLIP32])
    assert run(media, tmp_path / "out", buckets=[IMAGE], overwrite=True).state == "done"
    with pytest.raises(DataError, match="already there, from other input or options"):
        run(media, tmp_path / "out", buckets=[CLIP32])
    with pytest.raises(DataError, match="nowhere: not there"):
        run(tmp_path / "nowhere", tmp_path / "new")


def test_the_verb_prints_json_and_exits_2_for_a_mistake(
    media: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["preprocess-video", str(media / "00.mp4"), "--output", str(tmp_path / "out")]
    (media / "00.txt").write_text("a shape")
    shapes_wanted = ["--bucket", "clip32=32x32x16", "--fps", "16", "--heldout-frac", "0", "--json"]
    assert main([*arguments, *shapes_wanted]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == {"train": {"clip32": 1}}
    assert main([*arguments, *shapes_wanted]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "already done"
    (media / "00.txt").write_text("another caption")
    assert main([*arguments, *shapes_wanted]) == 2
    assert "already there" in capsys.readouterr().err
    assert main([*arguments, *shapes_wanted, "--overwrite", "--slurm-array", "2"]) == 2
    assert "--slurm-array needs the cluster's --profile" in capsys.readouterr().err
