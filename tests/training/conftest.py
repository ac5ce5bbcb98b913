"""The corpus is written once for all tests of a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.runs import Runs
from tests.training.tiny import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(corpus, tmp_path_factory.mktemp("runs"))
