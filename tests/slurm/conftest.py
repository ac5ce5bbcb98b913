"""One cluster for all tests, and the runs that nothing disturbed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.slurm.cluster import IS_HERE, Cluster
from tests.slurm.toy import toy_values, write_toy
from tests.training.runs import rows, train_rank
from tests.training.tiny import write_corpus

NODES = 11  # some for each run of ``drivers``


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here needs a Slurm to start."""
    for item in items:
        if Path(item.path).parent == Path(__file__).parent:
            item.add_marker(pytest.mark.slurm)
            if not IS_HERE:
                item.add_marker(pytest.mark.skip(reason="needs slurm-wlm and root"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Up in half a second; taken down with all that runs on it. munge wants a path open to all."""
    with TemporaryDirectory(prefix="testcluster-") as folder:
        made = Cluster(Path(folder))
        made("start", NODES)
        yield made
        made("stop")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs are."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, folder: Path) -> list[dict[str, Any]]:
    """The toy run on two data-parallel ranks of this machine, without Slurm, in one go."""
    return _local(corpus, folder / "undisturbed")


@pytest.fixture(scope="session")
def undisturbed_amended(corpus: Path, folder: Path) -> list[dict[str, Any]]:
    """The same with the curriculum that ``amended_curriculum`` gives, from the start."""
    return _local(
        corpus, folder / "amended", curriculum=amended_curriculum(corpus, folder / "amended")
    )


def amended_curriculum(corpus: Path, run_folder: Path) -> dict[str, Any]:
    """The toy's, with another rate at the end of the second phase."""
    curriculum: dict[str, Any] = toy_values(corpus, run_folder)["curriculum"]
    curriculum["phases"][1]["learning_rate"]["to"] = 1e-3
    return curriculum


def _local(corpus: Path, run_folder: Path, **changes: Any) -> list[dict[str, Any]]:
    recipe = write_toy(corpus, run_folder, **changes)
    run_ranks(train_rank, 2, str(recipe), 2, None)
    return rows(run_folder)
