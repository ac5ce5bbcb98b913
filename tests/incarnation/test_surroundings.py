"""What ranks find around them, as a record and as sentences."""

from __future__ import annotations

import os

import pytest

from megatron_curr.incarnation.surroundings import (
    Surroundings,
    crowded_nodes,
    describe_ranks,
    spans,
    telling,
)


def around(*cores: int, machine_cores: int = 8, **variables: str) -> Surroundings:
    return Surroundings(
        cores=cores, machine_cores=machine_cores, devices=("0",), variables=variables
    )


def test_this_process_names_its_cores_devices_and_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("WANDB_API_KEY", "abcdef")
    found = Surroundings.of_this_process()
    assert set(found.cores) == os.sched_getaffinity(0)
    assert found.devices == ("0", "3") and str(found).endswith("devices 0,3")
    assert found.variables["NCCL_DEBUG"] == "INFO"
    assert found.variables["WANDB_API_KEY"] == "(set)"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Surroundings.of_this_process().devices == ()


def test_variables_that_change_nothing_are_not_told() -> None:
    assert telling({"EDITOR": "vi", "PWD": "/", "RANK": "0", "https_proxy": "p"}) == {
        "RANK": "0",
        "https_proxy": "p",
    }


def test_spans_of_numbers() -> None:
    assert spans([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"
    assert spans([]) == ""


def test_the_record_says_once_what_all_ranks_share() -> None:
    found = [("a", around(0, 1, X="1", Y="1")), ("a", around(2, 3, X="1", Y="2")), ("b", around(0))]
    record = describe_ranks(found[:2])
    assert record["variables"] == {"X": "1"}
    first, second = record["ranks"]  # type: ignore[misc]
    assert first["cores"] == "0-1" and first["variables"] == {"Y": "1"}
    assert second == {
        "node": "a",
        "cores": "2-3",
        "machine_cores": 8,
        "devices": ["0"],
        "variables": {"Y": "2"},
    }
    assert describe_ranks(found)["variables"] == {}


def test_ranks_on_fewer_cores_than_there_are_ranks_are_named() -> None:
    bound = [("a", around(0)), ("a", around(0)), ("b", around(0, 1)), ("b", around(0, 1))]
    assert crowded_nodes(bound) == ["a: 2 ranks share 1 of its 8 cores (0)"]
    small = [("a", around(0, 1, machine_cores=2)) for _ in range(4)]
    assert crowded_nodes(small) == []
