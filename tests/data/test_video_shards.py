from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load as load_safetensors

from megatron_curr.data.tensor_file import from_bf16, pack_tensors, to_bf16, unpack_tensors
from megatron_curr.data.video_manifest import FILE_NAME
from megatron_curr.data.video_shards import (
    EMPTY_TEXT_NAME,
    INDEX_NAME,
    check_latents,
    check_same_encoders,
    open_video_shards,
)
from megatron_curr.errors import DataError
from tests.data.video_folders import BUCKETS, CODEC, TEXT, drawn_samples, write_drawn_folder

COUNTS = {"image32": 5, "clip32": 7, "wide": 2}


@given(
    arrays.arrays(
        np.float32, 40, elements=st.floats(-(2.0**126), 2.0**126, width=32, allow_subnormal=False)
    )
)
def test_bf16_rounds_as_torch_does(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bf16(to_bf16(values)), expected)


def test_tensor_file_is_a_safetensors_file() -> None:
    tensors = {"text": np.ones((3, 4), np.float32), "latents": np.full((2, 1, 2, 2), 0.1, "f4")}
    content = pack_tensors(tensors)
    read = load_safetensors(content)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in read.items()} == {
        "latents": (torch.bfloat16, (2, 1, 2, 2)),
        "text": (torch.bfloat16, (3, 4)),
    }
    again = unpack_tensors(content)
    for name, tensor in read.items():
        np.testing.assert_array_equal(again[name], tensor.float().numpy())
    with pytest.raises(ValueError, match="cut short"):
        unpack_tensors(content[:-1])


@pytest.mark.parametrize("tar_bytes", [1, 40_000, 1 << 30])
def test_any_sample_is_read_back_by_its_number(tmp_path: Path, tar_bytes: int) -> None:
    manifest = write_drawn_folder(tmp_path, COUNTS, tar_bytes=tar_bytes)
    shards = open_video_shards(tmp_path, name="shapes")
    assert (shards.name, shards.num_samples, shards.bucket_names) == (
        "shapes",
        14,
        tuple(sorted(BUCKETS)),
    )
    assert len(manifest.tars) == {1: 14, 40_000: 2, 1 << 30: 1}[tar_bytes]
    for number, sample in reversed(list(enumerate(drawn_samples(COUNTS)))):
        clip = shards.read(number)
        np.testing.assert_array_equal(clip.latents_CTYX, from_bf16(to_bf16(sample.latents_CTYX)))
        np.testing.assert_array_equal(clip.text_LE, from_bf16(to_bf16(sample.text_LE)))
        assert (clip.caption, clip.key, clip.fps) == (sample.caption, sample.key, sample.fps)
        assert number in shards.clips_of(sample.bucket)
        assert shards.text_lengths[number] == len(sample.text_LE)
    assert sum(len(shards.clips_of(bucket)) for bucket in BUCKETS) == shards.num_samples
    assert shards.empty_text_LE.shape == (1, TEXT.width)


def test_tars_are_webdataset_tars(tmp_path: Path) -> None:
    write_drawn_folder(tmp_path, COUNTS)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        names = tar.getnames()
        content = tar.extractfile(names[0])
        assert content is not None and json.load(content)["caption"] == "clip 0 of image32"
    assert names[:3] == [
        "00000000-image32.json",
        "00000000-image32.safetensors",
        "00000001-clip32.json",
    ]


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        write_drawn_folder(tmp_path / name, COUNTS, tar_bytes=40_000)
    files = [sorted((tmp_path / name).iterdir()) for name in "ab"]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("00000.tar", lambda old: old[:-1], "the manifest says .* cut short or was replaced"),
        ("00000.tar", None, "listed in the manifest but not there"),
        (INDEX_NAME, lambda old: old[:40], "index.npy: cannot be read"),
        (INDEX_NAME, lambda old: _npy(np.zeros(3)), "3 rows of 8 bytes"),
        (EMPTY_TEXT_NAME, None, "cannot be read"),
        (FILE_NAME, lambda old: old[:50], "cannot be read"),
        (FILE_NAME, lambda old: b'{"format": "other"}', "describes 'other'"),
        (FILE_NAME, lambda old: old.replace(b'"version": 1', b'"version": 9'), "version 9"),
        (FILE_NAME, lambda old: old.replace(b'"codec"', b'"kodec"'), "not complete"),
        (FILE_NAME, None, "no folder of video shards"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, name: str, damage, message: str) -> None:
    write_drawn_folder(tmp_path, COUNTS)
    if damage is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(DataError, match=message) as found:
        shards = open_video_shards(tmp_path)
        shards.read(0)
        _ = shards.empty_text_LE
    assert str(tmp_path) in str(found.value)


def _npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def test_a_tar_of_other_samples_is_refused(tmp_path: Path) -> None:
    write_drawn_folder(tmp_path, COUNTS)
    content = bytearray((tmp_path / "00000.tar").read_bytes())
    content[512:1400] = bytes(888)
    (tmp_path / "00000.tar").write_bytes(content)
    with pytest.raises(DataError, match="sample 0 at byte 512 cannot be read"):
        open_video_shards(tmp_path).read(0)


def test_a_folder_without_samples_is_refused(tmp_path: Path) -> None:
    write_drawn_folder(tmp_path, {})
    with pytest.raises(DataError, match="holds no sample"):
        open_video_shards(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compression": [4, 8, 8]}, r"compression \[8, 8, 8\], but the recipe says \[4, 8, 8\]"),
        ({"channels": 16}, "latent channels 24, but the recipe says 16"),
        ({"text_width": 4096}, "width 64, but the recipe says 4096"),
        ({"buckets": {"clip64": (64, 64, 32)}}, "no sample of bucket 'clip64'"),
        ({"buckets": {"wide": (32, 64, 16)}}, "no sample of bucket 'wide'"),
        ({"buckets": {"clip32": (32, 32, 16)}}, r"recipe says \(32, 32, 16\)"),
    ],
)
def test_shards_of_another_codec_or_shape_are_refused(tmp_path: Path, change, message: str) -> None:
    write_drawn_folder(tmp_path, {"clip32": 2, "wide": 0})
    shards = open_video_shards(tmp_path)
    fits = {
        "compression": [8, 8, 8],
        "channels": 24,
        "text_width": 64,
        "buckets": {"clip32": (32, 32, 32)},
    }
    check_latents(shards, **fits)
    with pytest.raises(DataError, match=message):
        check_latents(shards, **{**fits, **change})


def test_folders_normalised_differently_are_not_mixed(tmp_path: Path) -> None:
    write_drawn_folder(tmp_path / "a", {"clip32": 1})
    write_drawn_folder(tmp_path / "b", {"clip32": 1})
    other = dataclasses.replace(CODEC, std=(2.0,) * 24)
    write_drawn_folder(tmp_path / "c", {"clip32": 1}, codec=other)
    a, b, c = (open_video_shards(tmp_path / name) for name in "abc")
    check_same_encoders([a, b])
    with pytest.raises(DataError, match="made with codec 'haar' and 'haar', whose std differ"):
        check_same_encoders([a, c])


def test_the_order_of_the_manifests_keys_moves_no_bucket(tmp_path: Path) -> None:
    write_drawn_folder(tmp_path, COUNTS)
    before = open_video_shards(tmp_path)
    file = tmp_path / FILE_NAME
    content = json.loads(file.read_text())
    content["buckets"] = dict(reversed(content["buckets"].items()))
    file.write_text(json.dumps(content))
    after = open_video_shards(tmp_path)
    for name in BUCKETS:
        assert after.clips_of(name).tolist() == before.clips_of(name).tolist()
