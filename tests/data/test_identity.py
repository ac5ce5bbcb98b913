"""No file is read as two things, and files that changed under a run are found."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_curr.data.identity import (
    BLOCKS,
    Files,
    KnownData,
    check_separate,
    check_tokenizer_unchanged,
    check_unchanged,
    files_of,
    known_of,
    read_known,
)
from megatron_curr.data.manifest import FILE_NAME as MANIFEST
from megatron_curr.data.manifest import Manifest, write_manifest
from megatron_curr.data.shards import ShardWriter, open_shards
from megatron_curr.data.video_shards import open_video_shards
from megatron_curr.errors import CheckpointError, DataError
from tests.data.video_folders import write_drawn_folder

Place = Callable[[Path], str]


def write_folder(
    folder: Path, *, first: int, with_manifest: bool = True, backwards: bool = False
) -> Path:
    """Two shards of documents of one length."""
    folder.mkdir(parents=True)
    records = []
    for number in range(2):
        documents = [np.arange(9) + first + 100 * number + n for n in range(20)]
        with ShardWriter(folder / f"{number:05d}", np.dtype(np.uint16)) as writer:
            for document in documents[::-1] if backwards else documents:
                writer.add_documents(document, [9])
        records.append(writer.record)
    if with_manifest:
        write_manifest(folder, Manifest("uint16", None, tuple(records)))
    return folder


def files(heldout: dict[str, str] | None = None, **train: str) -> Files:
    sets = {name: open_shards(spec, name=name) for name, spec in train.items()}
    return files_of(sets, {name: open_shards(spec) for name, spec in (heldout or {}).items()})


def as_link(root: Path) -> str:
    (root / "link").symlink_to(root / "web", target_is_directory=True)
    return str(root / "link")


def by_another_way(root: Path) -> str:
    return os.path.relpath(root / "code" / ".." / "web")


def as_copy(root: Path) -> str:
    return str(shutil.copytree(root / "web", root / "copy"))


def as_copy_without_manifest(root: Path) -> str:
    (Path(as_copy(root)) / MANIFEST).unlink(missing_ok=True)
    return str(root / "copy")


def as_hard_links(root: Path) -> str:
    return str(shutil.copytree(root / "web", root / "hard", copy_function=os.link))


def one_shard_of_it(root: Path) -> str:
    return str(root / "web" / "00001")


def all_that_is_there(root: Path) -> str:
    return str(root / "*" / "*.idx")


WAYS: list[Place] = [
    lambda root: str(root / "web"),
    as_link,
    by_another_way,
    as_copy,
    as_copy_without_manifest,
    as_hard_links,
    one_shard_of_it,
    all_that_is_there,
]


@pytest.fixture(params=[True, False], ids=["manifest", "no manifest"])
def root(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    for number, name in enumerate(("web", "code", "held")):
        write_folder(tmp_path / name, first=1000 * number, with_manifest=request.param)
    return tmp_path


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__.strip("<>"))
def test_held_out_files_that_are_trained_on_are_refused(root: Path, way: Place) -> None:
    found = files({"code": way(root)}, web=str(root / "web"), code=str(root / "code"))
    with pytest.raises(DataError) as refused:
        check_separate(found)
    message = str(refused.value)
    assert message.startswith("data.sources.") and ".heldout both read " in message
    assert "what is held out would be trained on" in message
    assert str(root) in message or "../" in message


@pytest.mark.parametrize("way", WAYS[:-1], ids=lambda way: way.__name__.strip("<>"))
def test_one_shard_in_two_sources_is_refused(root: Path, way: Place) -> None:
    with pytest.raises(DataError, match="would be read as two sources, more often than max_epochs"):
        check_separate(files(web=str(root / "web"), again=way(root)))


def test_a_glob_that_meets_a_shard_twice_is_refused(root: Path) -> None:
    as_link(root)
    with pytest.raises(DataError, match=r"data\.sources\.web\.shards reads .*one shard twice"):
        check_separate(files(web=str(root / "*" / "*.idx")))


def test_sources_of_their_own_and_shared_held_out_files_are_fine(root: Path) -> None:
    held = str(root / "held")
    found = files({"web": held, "code": held}, web=str(root / "web"), code=str(root / "code"))
    check_separate(found)
    assert sorted(found) == ["code.heldout", "code.shards", "web.heldout", "web.shards"]


def changed(before: Files, after: Files) -> str:
    with pytest.raises(CheckpointError) as refused:
        check_unchanged(known_of(before, None), after, remedy="put it back")
    return str(refused.value)


def test_the_same_documents_in_another_order_are_other_files(root: Path) -> None:
    with_manifest = (root / "web" / MANIFEST).exists()
    before = files(web=str(root / "web"))
    check_unchanged(known_of(before, None), files(web=by_another_way(root)), remedy="")
    shutil.rmtree(root / "web")
    write_folder(root / "web", first=0, with_manifest=with_manifest, backwards=True)
    told = changed(before, files(web=str(root / "web")))
    assert told.startswith("data.sources.web.shards: not the files that the run began with: ")
    assert f"{root / 'web' / '00000.bin'}, 1 of 2, is another" in told and "put it back" in told


def test_a_shard_more_is_told(root: Path) -> None:
    before = files(web=str(root / "web" / "*.idx"))
    for suffix in (".bin", ".idx"):
        shutil.copy(root / "code" / f"00001{suffix}", root / "web" / f"00002{suffix}")
    (root / "web" / MANIFEST).unlink(missing_ok=True)
    told = changed(files(web=str(root / "web" / "0000[01].idx")), files(web=str(root / "web")))
    assert "there were 2 and are 3" in told
    assert len(before["web.shards"]) == 2


def test_a_manifest_may_come_and_is_missed_when_it_goes(tmp_path: Path) -> None:
    folder = str(write_folder(tmp_path / "web", first=0))
    manifest = tmp_path / "web" / MANIFEST
    by_sha256 = files(web=folder)
    text = manifest.read_text()
    manifest.unlink()
    by_blocks = files(web=folder)
    assert by_blocks["web.shards"][0].digest.startswith(BLOCKS)
    assert "has no manifest beside it any more" in changed(by_sha256, by_blocks)
    manifest.write_text(text)
    check_unchanged(known_of(by_blocks, None), files(web=folder), remedy="")


def test_video_folders_are_told_apart_by_their_tars(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_drawn_folder(tmp_path / name, {"image32": 6, "wide": 2}, seed=seed)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    sets = {name: open_video_shards(tmp_path / name) for name in ("a", "b", "copy")}
    check_separate(files_of({"a": sets["a"], "b": sets["b"]}, {}))
    for second in ("a", "copy"):
        with pytest.raises(DataError, match="would be read as two sources"):
            check_separate(files_of({"a": sets["a"], "c": sets[second]}, {}))
        with pytest.raises(DataError, match="what is held out would be trained on"):
            check_separate(files_of({"a": sets["a"]}, {"a": sets[second]}))
    before, after = files_of({"a": sets["a"]}, {}), files_of({"a": sets["b"]}, {})
    check_unchanged(known_of(before, None), files_of({"a": sets["copy"]}, {}), remedy="")
    assert "00000.tar, 1 of 1, is another" in changed(before, after)


def test_what_is_known_survives_the_disk_and_another_tokenizer_is_refused(root: Path) -> None:
    assert read_known(root) is None
    known = known_of(files(web=str(root / "web")), "ab" * 32)
    (root / "data.json").write_text(known.text())
    assert read_known(root) == known
    both = known.with_others(known_of(files(web=str(root / "code"), code=str(root / "code")), None))
    assert both.digests["web.shards"] == known.digests["web.shards"]
    assert sorted(both.digests) == ["code.shards", "web.shards"]
    check_tokenizer_unchanged(known, "ab" * 32, remedy="")
    check_tokenizer_unchanged(KnownData(None, {}), "cd" * 32, remedy="")
    with pytest.raises(CheckpointError, match="cdcdcdcdcdcdcdcd, but the run began with abababab"):
        check_tokenizer_unchanged(known, "cd" * 32, remedy="put it back")
    (root / "data.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"data\.json: cannot be read"):
        read_known(root)
