"""This rank's place on every parallel axis, and the process groups that go with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_curr.errors import RecipeError

if TYPE_CHECKING:
    from megatron_curr.recipe.parallel import Parallel


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """Ranks and sizes on each axis, the device, and megatron-core's groups."""

    rank: int
    world_size: int
    dp_rank: int
    dp_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    """Place among the ranks that cut one expert."""
    etp_size: int
    device: torch.device
    pg_collection: ProcessGroupCollection
    """Handed to megatron-core's constructors and schedules."""


@contextmanager
def one_rank() -> Iterator[None]:
    """``torch.distributed`` with this process alone, as megatron-core's modules and loader want it.

    Where it is initialised already, raises ``RuntimeError`` unless this process is all there is.
    """
    if dist.is_initialized():
        if dist.get_world_size() != 1:
            raise RuntimeError("this is done in a process of its own, on one rank")
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build_groups(parallel: Parallel, *, seed: int = 1234) -> Groups:
    """Make every process group of the layout; ``torch.distributed`` is initialised before.

    Also seeds megatron-core's per-axis random states, which must exist before a layer runs under
    sequence parallelism. Weights do not come from them (``models/weights.py``), and text models
    have no dropout, so ``seed`` does not change a result. Collective: every rank calls it.

    Raises ``RecipeError`` when the world size is not a multiple of TP x PP x CP, or of the ranks
    that hold one set of experts.
    """
    world_size = dist.get_world_size()
    _check_world_size(parallel, world_size)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed % 2**31, force_reset_rng=True)
    pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return Groups(
        rank=dist.get_rank(),
        world_size=world_size,
        dp_rank=pg_collection.dp.rank(),
        dp_size=pg_collection.dp.size(),
        tp_rank=pg_collection.tp.rank(),
        tp_size=pg_collection.tp.size(),
        pp_rank=pg_collection.pp.rank(),
        pp_size=pg_collection.pp.size(),
        cp_rank=pg_collection.cp.rank(),
        cp_size=pg_collection.cp.size(),
        ep_rank=pg_collection.ep.rank(),
        ep_size=pg_collection.ep.size(),
        etp_rank=pg_collection.expt_tp.rank(),
        etp_size=pg_collection.expt_tp.size(),
        device=_own_device(),
        pg_collection=pg_collection,
    )


def destroy_groups() -> None:
    """Undo ``build_groups``; the default process group stays. Collective."""
    groups = [group for group in parallel_state._global_process_group_list or [] if group]
    parallel_state.destroy_model_parallel()
    for group in {id(group): group for group in groups}.values():
        if group is not dist.group.WORLD and group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(group)


def _check_world_size(parallel: Parallel, world_size: int) -> None:
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    model_ranks = tp * pp * cp
    if world_size % model_ranks:
        fits = max(world_size // model_ranks, 1) * model_ranks
        raise RecipeError(
            f"parallel: {world_size} ranks do not fit tensor {tp} x pipeline {pp} x context {cp}"
            f" = {model_ranks}; start a multiple of {model_ranks} ranks (for example {fits}), or"
            " change one of these sizes"
        )
    ep, etp = parallel.expert_model_parallel_size, parallel.expert_tp_size
    if ep > 1 and world_size % (ep * etp * pp):
        raise RecipeError(
            f"parallel: {world_size} ranks do not fit expert {ep} x expert tensor {etp} x pipeline"
            f" {pp} = {ep * etp * pp}; start a multiple of {ep * etp * pp} ranks, or change one of"
            " these sizes"
        )
    if parallel.virtual_pipeline_model_parallel_size is not None and pp == 1:
        raise RecipeError(
            "parallel.virtual_pipeline_model_parallel_size="
            f"{parallel.virtual_pipeline_model_parallel_size} needs"
            " pipeline_model_parallel_size of 2 or more, but it is 1; remove it"
        )


def _own_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")
