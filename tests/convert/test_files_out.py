"""Files of a conversion are whole or not there, and the same whoever writes them."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from megatron_curr.convert.export import export
from megatron_curr.convert.files_out import Block, bytes_block, write_files
from megatron_curr.convert.import_model import import_model
from megatron_curr.convert.source import open_source
from megatron_curr.errors import CheckpointError
from tests.convert.toy_models import save_toy
from tests.ranks import PRELOAD

WRITERS = {"hf": export, "checkpoint": import_model}


def write(source: Path, output: Path, to: str, die_after_bytes: int | None = None) -> int:
    """Convert in small files, or the beginning of it; returns the bytes written."""
    written = 0

    def count(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if die_after_bytes is not None and written >= die_after_bytes:
            os.kill(os.getpid(), signal.SIGKILL)

    WRITERS[to](open_source(source), output, max_file_bytes=8_000, on_bytes=count)
    return written


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("to", WRITERS)
def test_a_killed_conversion_ends_with_the_bytes_of_an_unbroken_one(
    tmp_path: Path, to: str
) -> None:
    save_toy("llama2", tmp_path / "source")
    size = write(tmp_path / "source", tmp_path / "unbroken", to)
    output = tmp_path / "output"

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=write, args=(tmp_path / "source", output, to, size * 7 // 10))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not output.exists()
    whole = [
        path
        for path in (tmp_path / ".output.partial").iterdir()
        if path.suffix in (".safetensors", ".distcp")
    ]
    stamps = {path.name: path.stat().st_mtime_ns for path in whole}
    assert stamps

    assert 0 < write(tmp_path / "source", output, to) < size
    assert contents(output) == contents(tmp_path / "unbroken")
    assert {name: (output / name).stat().st_mtime_ns for name in stamps} == stamps
    assert sorted(path.name for path in tmp_path.iterdir()) == ["output", "source", "unbroken"]


def test_a_source_that_changed_in_between_is_read_again(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_toy("llama2", tmp_path / "source")

    def interrupt(count: int) -> None:
        if list(tmp_path.glob(".output.partial/*.distcp")):
            raise KeyboardInterrupt

    source = open_source(tmp_path / "source")
    with pytest.raises(KeyboardInterrupt):
        import_model(source, tmp_path / "output", max_file_bytes=8_000, on_bytes=interrupt)
    path = tmp_path / "source" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    write(tmp_path / "source", tmp_path / "output", "checkpoint")
    ours, theirs = (open_source(tmp_path / name).weights for name in ("output", "source"))
    name = "embedding.word_embeddings.weight"
    assert torch.equal(ours.read(name), theirs.read(name))


def test_a_full_disk_is_told_and_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_toy("llama2", tmp_path / "source")

    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(CheckpointError, match="does not fit on the disk"):
        write(tmp_path / "source", tmp_path / "output", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_do_not_depend_on_threads(tmp_path: Path) -> None:
    files = {
        f"{number}.bin": [bytes_block(bytes([number, place]) * (place + 1)) for place in range(50)]
        for number in range(5)
    }
    for num_threads in (1, 4):
        folder = tmp_path / str(num_threads)
        folder.mkdir()
        write_files(folder, files, num_threads=num_threads)
        assert contents(folder) == {
            name: b"".join(bytes(block.read()) for block in blocks)
            for name, blocks in files.items()
        }


def test_a_block_that_cannot_be_read_leaves_no_file_of_that_name(tmp_path: Path) -> None:
    def fail() -> bytes:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        write_files(tmp_path, {"a": [bytes_block(b"a"), Block(3, fail)], "b": [bytes_block(b"b")]})
    assert not (tmp_path / "a").exists()
