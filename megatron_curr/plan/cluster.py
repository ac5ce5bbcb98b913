"""The machines a run is planned for: GPUs from a table or by numbers, nodes, and links."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.problems import did_you_mean

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One accelerator. Rates are one way, in bytes/s or FLOP/s, as advertised."""

    name: str
    memory_bytes: float  # that a process finds
    peak_flops: float  # dense bf16
    memory_bandwidth: float
    nvlink_bandwidth: float  # to GPUs of the same node
    network_bandwidth: float  # to other nodes, for each GPU
    kernel_frac: float = 0.65  # of the peak, that matrices and attention reach in training
    source: str = "given on the command line"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Equal nodes; ranks fill one node after the other."""

    num_nodes: int
    gpus_per_node: int
    gpu: Gpu

    @property
    def world_size(self) -> int:
        """Ranks of the job: one a GPU."""
        return self.num_nodes * self.gpus_per_node


def gpu_names() -> list[str]:
    """Every GPU of the table."""
    return list(_table())


def find_gpu(
    name: str,
    *,
    memory_gib: float | None = None,
    peak_tflops: float | None = None,
    nvlink_gb_s: float | None = None,
    network_gb_s: float | None = None,
) -> Gpu:
    """A GPU of the table, with what is given put in its place; or one made of numbers alone.

    A GPU that the table lacks needs its memory and its peak; links not given are PCIe 5.0 (64 GB/s)
    inside a node and 400 Gb/s between nodes. Raises ``RecipeError`` for an unknown name.
    """
    row = _table().get(name)
    if row is None and (memory_gib is None or peak_tflops is None):
        raise RecipeError(
            f"--gpu {name}: not in the table; {did_you_mean(name, gpu_names(), what='GPUs')}; or "
            "describe it by --gpu-memory-gib and --peak-tflops (and --nvlink-gb-s, --network-gb-s)"
        )
    gpu = _of_row(name, row) if row else _of_numbers(name)
    return replace(
        gpu,
        memory_bytes=memory_gib * _GIB if memory_gib else gpu.memory_bytes,
        peak_flops=peak_tflops * 1e12 if peak_tflops else gpu.peak_flops,
        nvlink_bandwidth=nvlink_gb_s * 1e9 if nvlink_gb_s else gpu.nvlink_bandwidth,
        network_bandwidth=network_gb_s * 1e9 if network_gb_s else gpu.network_bandwidth,
    )


def _of_row(name: str, row: dict[str, Any]) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=row["memory_gib"] * _GIB,
        peak_flops=row["peak_tflops"] * 1e12,
        memory_bandwidth=row["memory_gb_s"] * 1e9,
        nvlink_bandwidth=row["nvlink_gb_s"] * 1e9,
        network_bandwidth=row["network_gb_s"] * 1e9,
        kernel_frac=row["kernel_frac"],
        source=row["source"],
    )


def _of_numbers(name: str) -> Gpu:
    return Gpu(
        name=name,
        memory_bytes=0,
        peak_flops=0,
        memory_bandwidth=2e12,
        nvlink_bandwidth=64e9,
        network_bandwidth=50e9,
    )


@cache
def _table() -> dict[str, dict[str, Any]]:
    text = files(__package__).joinpath("gpus.yaml").read_text(encoding="utf-8")
    table: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return table
