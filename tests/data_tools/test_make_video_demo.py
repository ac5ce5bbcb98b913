from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from data_tools.make_video_demo import MOTIONS, NUM_KINDS, draw, make_video_demo, scene
from data_tools.seen_motion import seen_colour, seen_motion
from data_tools.video_decode import opened
from megatron_curr.data.codecs import HaarCodec


def test_clips_are_real_files_that_show_their_captions(tmp_path: Path) -> None:
    folders = make_video_demo(tmp_path, num_clips=8, num_pictures=2)
    listed = [json.loads(line) for line in (folders["clips"] / "captions.jsonl").open()]
    assert {Path(row["file"]).suffix for row in listed} == {".mp4", ".webm"}
    for number, row in enumerate(listed):
        with opened(folders["clips"] / row["file"]) as media:
            frames = np.stack([frame for _, frame in media.frames])
        assert np.abs(frames.astype(int) - draw(scene(number))).mean() < 3
        assert row["caption"] == scene(number).caption
    pictures = [json.loads(line) for line in (folders["pictures"] / "captions.jsonl").open()]
    assert [row["caption"] for row in pictures] == ["a red square", "a green square"]


def test_the_same_clips_are_the_same_bytes(tmp_path: Path) -> None:
    once, again = (
        make_video_demo(tmp_path / name, num_clips=5, num_pictures=1) for name in ("once", "again")
    )
    for kind, folder in once.items():
        for path in folder.iterdir():
            assert path.read_bytes() == (again[kind] / path.name).read_bytes()


def test_motion_and_colour_are_recognised_after_the_codec() -> None:
    codec = HaarCodec()
    for number in range(0, 84, 5):
        clip, caption = draw(scene(number)), scene(number).caption
        for frames in (clip, codec.decode(codec.encode(clip))):
            assert seen_motion(frames) in caption
            assert seen_colour(frames) in caption


def test_captions_cover_every_motion_before_any_repeats() -> None:
    captions = [scene(number).caption for number in range(NUM_KINDS)]
    assert all(any(c.endswith(motion) for c in captions[:7]) for motion in MOTIONS)
    assert len(set(captions)) == 6 * 4 * 3 + 4  # only bars rotate
    assert scene(NUM_KINDS).caption == captions[0] and scene(NUM_KINDS) != scene(0)
