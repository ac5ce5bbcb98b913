"""What ``mcore_shim.py`` puts in the place of names that need CUDA, or more than gloo can do.

Nothing here patches anything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Make = Callable[[Any], Any]
"""Given the original object, the object that takes its place."""

CPU = torch.device("cpu")


class CpuStream:
    """A queue with nothing in it: on the CPU every operation has ended when its call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.device = CPU

    def wait_stream(self, stream: object) -> None:
        """Nothing to wait for."""

    def wait_event(self, event: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always idle."""
        return True

    def record_event(self, event: CpuEvent | None = None) -> CpuEvent:
        """An event that has already happened."""
        return event or CpuEvent()


class CpuEvent:
    """A moment that has already passed."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def record(self, stream: object = None) -> None:
        """Nothing to record."""

    def wait(self, stream: object = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def query(self) -> bool:
        """Always done."""
        return True


@contextmanager
def stream_context(stream: object) -> Iterator[None]:
    yield


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def factory_on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def always(value: object) -> Make:
    return lambda original: lambda *args, **kwargs: value


def replaced_by(replacement: Any) -> Make:
    return lambda original: replacement


def itself(thing: Any, *args: object, **kwargs: object) -> Any:
    return thing


def type_with_cuda_name(original: Any) -> Any:
    @functools.wraps(original)
    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(tensor, *args, **kwargs)
        return original(tensor).replace("torch.", "torch.cuda.", 1)

    return type_


def rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def restore_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def seed(seed: int) -> None:
    torch.manual_seed(seed)


def loads_into_fresh_state(original: Any) -> Any:
    @functools.wraps(original)
    def sharded_state_dict(
        optimizer: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()
        return original(optimizer, model, is_loading, *args, **kwargs)

    return sharded_state_dict


def keeps_step(original: Any) -> Any:
    @functools.wraps(original)
    def set_states(optimizer: Any, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[parameter]
        main_parameter = optimizer.optimizer.param_groups[group]["params"][order]
        step = optimizer.optimizer.state.get(main_parameter, {}).get("step")
        original(optimizer, parameter, tensors if step is None else {"step": step, **tensors})

    return set_states


def unshares_step(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(optimizer: Any, state_dict: Any) -> None:
        original(optimizer, state_dict)
        for state in optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


def _as_list(sizes: Any) -> Any:
    return sizes if sizes is None or isinstance(sizes, list) else sizes.tolist()


def splits_as_lists(original: Any) -> Any:
    @functools.wraps(original)
    def all_to_all(
        group: Any,
        input_: torch.Tensor,
        output_split_sizes: Any = None,
        input_split_sizes: Any = None,
    ) -> Any:
        return original(group, input_, _as_list(output_split_sizes), _as_list(input_split_sizes))

    return all_to_all


def gathers_uneven_parts(original: Any) -> Any:
    @functools.wraps(original)
    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if output_split_sizes is None or group.size() == 1:
            return original(input_, group, output_split_sizes, *rest, **named)
        padded = input_.new_zeros((max(output_split_sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat(
            [part[:rows] for part, rows in zip(parts, output_split_sizes, strict=True)]
        )

    return gather


def scatters_uneven_parts(original: Any) -> Any:
    @functools.wraps(original)
    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *rest: Any, **named: Any
    ) -> torch.Tensor:
        if input_split_sizes is None or group.size() == 1:
            return original(input_, group, input_split_sizes, *rest, **named)
        whole = input_.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole.split(input_split_sizes)[group.rank()].clone()

    return reduce_scatter


def norm_summed_in_float64(
    chunk_size: int,
    overflow: torch.Tensor,
    tensor_lists: list[list[torch.Tensor]],
    per_tensor: bool,
    *args: object,
) -> tuple[torch.Tensor, None]:
    """2-norm [1] of all tensors of the first list, float32 as the callers reduce it."""
    norms = [torch.linalg.vector_norm(each, dtype=torch.float64) for each in tensor_lists[0]]
    return torch.linalg.vector_norm(torch.stack(norms)).to(torch.float32).reshape(1), None
