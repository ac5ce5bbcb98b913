from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.video_decode import Unreadable, opened
from data_tools.video_frames import Bucket, at_rate, fit, misfit, motion_of, sharpness_of
from megatron_curr.errors import DataError
from tests.data_tools.video_files import rotate, shapes, write_clip, write_nothing, write_sound

needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="needs nvidia-dali (pip install 'megatron-curr[dali]')",
)
DECODERS = ["pyav", pytest.param("dali", marks=needs_dali)]


def decoded(path: Path, decoder: str = "pyav") -> tuple[np.ndarray, list[float]]:
    with opened(path, decoder) as media:
        timed = list(media.frames)
        frames = np.stack([frame for _, frame in timed])
        assert frames.shape[1:3] == (media.height, media.width)
        return frames, [time_s for time_s, _ in timed]


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other).mean())


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".avi", ".mov"])
def test_frames_come_back_within_the_codecs_tolerance(tmp_path: Path, suffix: str) -> None:
    frames = shapes(1)
    got, times = decoded(write_clip(tmp_path / f"clip{suffix}", frames))
    assert got.shape == frames.shape
    assert difference(got, frames) < 3
    np.testing.assert_allclose(times, np.arange(16) / 16, atol=1e-3)


@needs_dali
@pytest.mark.parametrize("suffix", [".webm", ".avi"])
def test_both_decoders_give_the_same_frames(tmp_path: Path, suffix: str) -> None:
    path = write_clip(tmp_path / f"clip{suffix}", shapes(2))
    (ours, our_times), (theirs, their_times) = (decoded(path, name) for name in ("pyav", "dali"))
    assert ours.shape == theirs.shape
    # They scale the colour planes up differently, which shows at edges alone.
    assert difference(ours, theirs) < 2
    assert np.quantile(np.abs(ours.astype(int) - theirs), 0.9) <= 4
    np.testing.assert_allclose(our_times, their_times, atol=1e-3)


@needs_dali
def test_dali_without_a_gpu_refuses_what_it_cannot_decode(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", shapes(2))
    with pytest.raises(DataError, match=r"clip\.mp4: is h264.*use --decoder pyav"):
        decoded(path, "dali")


@pytest.mark.parametrize("decoder", DECODERS)
def test_varying_frame_rate_keeps_its_times(tmp_path: Path, decoder: str) -> None:
    frames = shapes(1, num_frames=6)
    path = write_clip(tmp_path / "clip.webm", frames, times=[0, 1, 2, 6, 7, 12])
    with opened(path, decoder) as media:
        shown = list(at_rate(media.frames, 16))
    expected = [0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 4, 5]
    assert [
        int(np.argmin([difference(frame, one) for one in frames])) for frame in shown
    ] == expected


def test_faster_files_are_thinned_to_the_rate(tmp_path: Path) -> None:
    frames = shapes(1, num_frames=24)
    with opened(write_clip(tmp_path / "clip.mp4", frames, fps=24)) as media:
        assert media.fps == 24
        shown = np.stack(list(at_rate(media.frames, 8)))
    assert len(shown) == 8 and difference(shown, frames[::3]) < 2


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_metadata_is_honoured(tmp_path: Path, turns: int) -> None:
    frames = np.ascontiguousarray(shapes(3)[:, :48])
    path = rotate(write_clip(tmp_path / "clip.mp4", frames), turns)
    got, _ = decoded(path)
    assert difference(got, np.rot90(frames, -turns, axes=(1, 2))) < 2


def test_odd_sizes_decode_whole(tmp_path: Path) -> None:
    frames = np.ascontiguousarray(shapes(3)[:, :61, :47])
    got, _ = decoded(write_clip(tmp_path / "clip.mov", frames))
    assert got.shape == frames.shape and difference(got, frames) < 2


def test_pictures_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    frame = np.ascontiguousarray(shapes(3)[0, :48])
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(frame).save(tmp_path / "picture.png", exif=exif)
    with opened(tmp_path / "picture.png") as media:
        assert media.is_image
        ((_, got),) = media.frames
    np.testing.assert_array_equal(got, np.rot90(frame, -1))


def broken_files(folder: Path) -> list[Path]:
    """Each wrong in its own way."""
    whole = write_clip(folder / "whole.mp4", shapes(1)).read_bytes()
    contents = {"empty.mp4": b"", "cut.mp4": whole[: len(whole) // 2], "text.webm": b"not a film"}
    contents["picture.png"] = b"\x89PNG and nothing else"
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write_sound(folder / "sound.mov")
    write_nothing(folder / "nothing.mov")
    others = ("sound.mov", "nothing.mov", "missing.mp4")
    return [folder / name for name in (*contents, *others)]


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_does_not_decode_is_unreadable(tmp_path: Path, decoder: str) -> None:
    for path in broken_files(tmp_path):
        with pytest.raises(Unreadable):
            decoded(path, decoder)


def test_a_picture_is_scaled_to_cover_and_cropped_from_the_middle() -> None:
    wide = np.zeros((64, 128, 3), np.uint8)
    wide[:, 32:96] = 200
    bucket = Bucket("square", 32, 32, 1)
    assert (fit(wide, bucket)[:, 2:-2] > 190).all()
    assert misfit(bucket, 128, 64, max_crop_frac=0.5) is None
    assert misfit(bucket, 128, 64, max_crop_frac=0.4) == "wrong_aspect"
    assert misfit(bucket, 128, 31, max_crop_frac=0.5) == "too_small"


def test_motion_and_sharpness_tell_good_clips_from_bad() -> None:
    moving, still = shapes(1), np.repeat(shapes(1)[:1], 16, 0)
    plain = np.full_like(moving, 90)
    assert motion_of(moving) > 0.3 > 0.0 == motion_of(still)
    assert sharpness_of(moving) > 50 > 0.0 == sharpness_of(plain)
