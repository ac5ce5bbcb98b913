"""The forked process that writes a checkpoint."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from megatron_curr.training import checkpoint_writer
from megatron_curr.training.checkpoint_writer import NUM_FORKS, Child


def _fork_with_hanging_children(folder: Path, num_hanging: int) -> None:
    """In a process of its own: what is registered at a fork stays."""

    def hang() -> None:
        (folder / f"child_{os.getpid()}").touch()
        while len(list(folder.glob("child_*"))) <= num_hanging:
            time.sleep(60)

    os.register_at_fork(after_in_child=hang)
    checkpoint_writer.READY_WITHIN_S = 0.2
    try:
        said, _, _ = Child(lambda: "written").result()
    except OSError as error:
        said = str(error)
    (folder / "said").write_text(said)


@pytest.mark.parametrize(
    ("num_hanging", "said"), [(1, "written"), (NUM_FORKS, f"none of {NUM_FORKS} forks came")]
)
def test_a_fork_that_does_not_come_to_itself_is_killed_and_made_again(
    num_hanging: int, said: str, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=_fork_with_hanging_children, args=(tmp_path, num_hanging)
    )
    process.start()
    process.join(60)
    assert (tmp_path / "said").read_text().startswith(said)
    children = [int(path.name.split("_")[1]) for path in tmp_path.glob("child_*")]
    assert len(children) == min(num_hanging + 1, NUM_FORKS)
    for pid in children:  # none is left behind
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
