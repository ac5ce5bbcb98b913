"""Adam's moments, and the average of the weights, in one form, whichever optimizer holds them.

A checkpoint keeps, for each trained parameter ``name``, ``optimizer.state.exp_avg.name`` and
``optimizer.state.exp_avg_sq.name``, and ``optimizer.state.fp32_param.name`` where the model's own
weights are bf16, and ``optimizer.state.exp_moving_avg.name`` where a run keeps an average of its
weights: each shaped and sharded like the parameter. megatron-core's optimizers each write
a form of their own (and its distributed optimizer hands all parameters one shared ``step`` tensor
on load when torch's AdamW is underneath, which then counts once per parameter), so a checkpoint of
one could not be read by another. Through this form the distributed optimizer may be switched on or
off, and any layout changed, between a save and a load.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

MOMENTS = ("exp_avg", "exp_avg_sq")
MAIN = "fp32_param"
AVERAGE = "exp_moving_avg"


@dataclass(frozen=True)
class Held:
    """A parameter as one rank's optimizer holds it."""

    model_param: Tensor
    main_param: Tensor  # what Adam updates: the parameter, its fp32 copy, or a flat piece of either
    piece: slice | None  # which part of the flattened parameter, None for all of it

    @property
    def has_own_main(self) -> bool:
        """Whether the fp32 values live in the optimizer and not in the model."""
        return self.model_param.dtype != self.main_param.dtype


def fill_missing_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its moments, as zeros, where no update has made them yet."""
    for part in _parts(optimizer):
        state = part.optimizer.state
        for held in _held(part):
            if not state[held.main_param]:
                for name in MOMENTS:
                    state[held.main_param][name] = torch.zeros_like(
                        held.main_param, dtype=torch.float32
                    )
                if _step_is_per_parameter(part):
                    state[held.main_param]["step"] = torch.tensor(0.0, dtype=torch.float32)


def start_average(optimizer: MegatronOptimizer) -> None:
    """Keep a moving average of the weights from now on; it starts as the weights themselves."""
    fill_missing_state(optimizer)
    for part in _parts(optimizer):
        part.optimizer.defaults[AVERAGE] = True  # for ranks that hold no parameter, too
        for held in _held(part):
            average = held.main_param.detach().to(torch.float32, copy=True)
            part.optimizer.state[held.main_param][AVERAGE] = average


@torch.no_grad()
def move_average(optimizer: MegatronOptimizer, decay: float) -> None:
    """Move the average towards the weights as they are after an update."""
    for part in _parts(optimizer):
        mains = [held.main_param.detach() for held in _held(part)]
        averages = [part.optimizer.state[held.main_param][AVERAGE] for held in _held(part)]
        if averages:
            torch._foreach_lerp_(averages, [main.float() for main in mains], 1 - decay)


def applied_updates(optimizer: MegatronOptimizer) -> int:
    """How many updates Adam has made; its bias correction depends on it."""
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if "step" in group:
                return int(group["step"])
        for state in part.optimizer.state.values():
            if "step" in state:
                return int(state["step"])
    return 0


def sharded_state(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """The moments as megatron-core sharded tensors, to be saved.

    Collective where the distributed optimizer is on: its pieces are put together bucket by bucket,
    and every parameter's state is kept and written by one of the data-parallel ranks, its owner.
    """
    fill_missing_state(optimizer)
    plans = _sharding_plans(model_state)
    tensors: dict[str, Any] = {}
    for part in _parts(optimizer):
        is_shared_out = isinstance(part, DistributedOptimizer)
        for param, name, value in _whole_tensors(part):
            plan = plans[id(param)]
            if is_shared_out:  # only the owner lists it, so its copy is the first over data ranks
                plan = replace(plan, replica_id=(*plan.replica_id[:-1], 0))
            tensors[f"{len(tensors)}"] = make_sharded_optimizer_tensor(
                plan, value, prefix=f"optimizer.state.{name}"
            )
    return tensors


def sharded_targets(optimizer: MegatronOptimizer, model_state: dict[str, Any]) -> dict[str, Any]:
    """Empty sharded tensors for what this rank needs, to be filled by a load."""
    plans = _sharding_plans(model_state)
    return {
        key: make_sharded_optimizer_tensor(
            plans[id(held.model_param)],
            torch.empty_like(held.model_param, dtype=torch.float32),
            prefix=f"optimizer.state.{name}",
        )
        for key, held, name in _targets(optimizer)
    }


def load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any], *, updates: int) -> None:
    """Copy what a load filled into ``sharded_targets`` to where the optimizer keeps it."""
    fill_missing_state(optimizer)
    with torch.no_grad():
        for key, held, name in _targets(optimizer):
            value = loaded[key]
            if held.piece is not None:
                value = value.flatten()[held.piece]
            state = _state_of(optimizer, held)
            (held.main_param if name == MAIN else state[name]).copy_(value)
    for part in _parts(optimizer):
        for group in part.optimizer.param_groups:
            if not _step_is_per_parameter(part):
                group["step"] = updates
        for state in part.optimizer.state.values():
            if "step" in state:
                state["step"] = torch.tensor(float(updates), dtype=torch.float32)


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    parts = optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    return [part for part in parts if not part.is_stub_optimizer]


def _step_is_per_parameter(part: MegatronOptimizer) -> bool:
    """torch's Adam counts per parameter, Transformer Engine's and Apex's per group."""
    return isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)


def _held(part: MegatronOptimizer) -> Iterator[Held]:
    if isinstance(part, DistributedOptimizer):
        groups = part.optimizer.param_groups
        for param, (group, index) in part.model_param_group_index_map.items():
            range_ = part._get_model_param_range_map(param)["param"]
            yield Held(param, groups[group]["params"][index], slice(range_.start, range_.end))
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        for params, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from (Held(param, main, None) for param, main in zip(params, mains, strict=True))
        for params in part.fp32_from_fp32_groups:
            yield from (Held(param, param, None) for param in params)
    else:
        yield from (Held(param, param, None) for param in part.get_parameters())


def _state_of(optimizer: MegatronOptimizer, held: Held) -> dict[str, Tensor]:
    for part in _parts(optimizer):
        if held.main_param in part.optimizer.state:
            return part.optimizer.state[held.main_param]
    raise AssertionError("every held parameter has state after fill_missing_state")


def _kept(part: MegatronOptimizer) -> tuple[str, ...]:
    """What the optimizer keeps of a parameter beside its values; the same on every rank."""
    return (*MOMENTS, AVERAGE) if part.optimizer.defaults.get(AVERAGE) else MOMENTS


def _targets(optimizer: MegatronOptimizer) -> Iterator[tuple[str, Held, str]]:
    index = 0
    for part in _parts(optimizer):
        for held in _held(part):
            for name in (*_kept(part), *([MAIN] if held.has_own_main else [])):
                yield f"{index}", held, name
                index += 1


def _sharding_plans(model_state: dict[str, Any]) -> dict[int, Any]:
    """The sharding of every parameter, by the identity of its tensor."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    return {id(plan.data): plan for plan in nested_values(sharded)}


def _whole_tensors(part: MegatronOptimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """(parameter, what it is, tensor of the parameter's shape) of everything to be saved."""
    if isinstance(part, DistributedOptimizer):
        yield from _owned_tensors(part)
        return
    for held in _held(part):
        for name in _kept(part):
            yield held.model_param, name, part.optimizer.state[held.main_param][name]
        if held.has_own_main:
            yield held.model_param, MAIN, held.main_param.detach()


def _owned_tensors(part: DistributedOptimizer) -> Iterator[tuple[Tensor, str, Tensor]]:
    """What this rank owns of the distributed optimizer; gathers a bucket at a time.

    Beyond its owned part a rank never holds more than one bucket of one kind. Not megatron-core's
    own gather: that one drops the padding between buckets but keeps offsets that count it, and says
    so in a warning about data corruption.
    """
    held_by_param = {held.model_param: held for held in _held(part)}
    group = part.data_parallel_group
    owners = _owners(part)
    for buffer, ranges_by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
        for ranges in ranges_by_dtype.values():
            for bucket, range_map in zip(buffer.buckets, ranges, strict=True):
                own_main = buffer.param_dtype != torch.float32
                shard_numel = bucket.grad_data.numel() // group.size()
                for name in (*_kept(part), *([MAIN] if own_main else [])):
                    shard = torch.zeros(
                        shard_numel, dtype=torch.float32, device=bucket.grad_data.device
                    )
                    for param, range_ in range_map["param_map"].items():
                        place = range_["gbuf_local"]
                        main = held_by_param[param].main_param
                        value = main if name == MAIN else part.optimizer.state[main][name]
                        shard[place.start : place.end] = value.detach().flatten()
                    shards = [torch.empty_like(shard) for _ in range(group.size())]
                    dist.all_gather(shards, shard, group=group)
                    whole = torch.cat(shards)
                    for param in bucket.params_list:
                        if owners[param] != group.rank():
                            continue
                        # bucket.param_to_index leaves out the padding between parameters
                        start, end, _ = buffer.param_index_map[param]
                        piece = whole[start - bucket.offset : end - bucket.offset]
                        yield param, name, piece.view(param.shape).clone()  # lets the bucket go


def _owners(part: DistributedOptimizer) -> dict[Tensor, int]:
    """The data-parallel rank that saves each parameter's state; all own about as much."""
    owned = [0] * part.data_parallel_group.size()
    owners = {}
    for buffer in part.buffers:
        for param in buffer.params:
            owners[param] = owned.index(min(owned))
            owned[owners[param]] += param.numel()
    return owners
