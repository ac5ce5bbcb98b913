"""Stand-ins that let megatron-core run on a machine without CUDA. The only file that patches.

megatron-core asks ``torch.cuda`` for its device, its random state and its streams, and names
``"cuda"`` in tensor factories. Where no CUDA device is present, ``install`` gives those names a CPU
meaning; where one is present it changes nothing. Every stand-in is a ``Patch`` in ``PATCHES`` that
says why it is needed and what upstream change would retire it.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_curr.errors import ShimError

Make = Callable[[Any], Any]
"""Given the original object, the object that takes its place."""

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Patch:
    """One name we assign to although we do not own it."""

    target: str
    """``module:name`` or ``module:Class.name``."""
    why: str
    drop_when: str
    make: Make

    def owner(self) -> tuple[Any, str]:
        """The object that holds the name, and the name. Raises ``ShimError`` if it has moved."""
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            getattr(owner, name)
        except (ImportError, AttributeError) as moved:
            raise ShimError(
                f"{self.target} is not where the CPU shim expects it ({moved}). Installed: torch "
                f"{torch.__version__}, {_megatron_version()}. It was needed because {self.why}; "
                f"it may be dropped when {self.drop_when}. Install the versions pinned in "
                f"constraints.txt, or mend {__name__}"
            ) from moved
        return owner, name

    def apply(self) -> None:
        """Put the stand-in in place."""
        owner, name = self.owner()
        setattr(owner, name, self.make(getattr(owner, name)))


def _megatron_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"megatron-core {version('megatron-core')}"
    except PackageNotFoundError:
        return "megatron-core missing"


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
def _stream_context(stream: object) -> Iterator[None]:
    yield


def _is_cuda(device: object) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def _factory_on_cpu(original: Any) -> Any:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    return factory


def _always(value: object) -> Make:
    return lambda original: lambda *args, **kwargs: value


def _replaced_by(replacement: Any) -> Make:
    return lambda original: replacement


def _itself(thing: Any, *args: object, **kwargs: object) -> Any:
    return thing


def _type_with_cuda_name(original: Any) -> Any:
    @functools.wraps(original)
    def type_(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(tensor, *args, **kwargs)
        return original(tensor).replace("torch.", "torch.cuda.", 1)

    return type_


def _rng_state(device: object = "cuda") -> torch.Tensor:
    return torch.get_rng_state()


def _restore_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    torch.set_rng_state(new_state)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)


def _loads_into_fresh_state(original: Any) -> Any:
    @functools.wraps(original)
    def sharded_state_dict(
        optimizer: Any, model: Any, is_loading: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        if is_loading and not optimizer.optimizer.state:
            optimizer._init_optimizer_states_with_dummy_values()
        return original(optimizer, model, is_loading, *args, **kwargs)

    return sharded_state_dict


def _keeps_step(original: Any) -> Any:
    @functools.wraps(original)
    def set_states(optimizer: Any, parameter: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = optimizer.model_param_group_index_map[parameter]
        main_parameter = optimizer.optimizer.param_groups[group]["params"][order]
        step = optimizer.optimizer.state.get(main_parameter, {}).get("step")
        original(optimizer, parameter, tensors if step is None else {"step": step, **tensors})

    return set_states


def _unshares_step(original: Any) -> Any:
    @functools.wraps(original)
    def load_state_dict(optimizer: Any, state_dict: Any) -> None:
        original(optimizer, state_dict)
        for state in optimizer.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()

    return load_state_dict


_NEVER = "megatron-core takes its device from the tensors or groups it is given"
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
_RNG = (
    "CudaRNGStatesTracker keeps one random state per parallel axis, on a CPU in torch's generator"
)
_RNG_DROP = "tensor_parallel.random learns CPU generators"
_STREAM = "expert and offload code makes streams and events while it builds or runs"
_STREAM_DROP = "megatron-core asks for streams only when CUDA is present"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "torch.cuda:current_device",
        "every layer, buffer and collective allocates on torch.cuda.current_device()",
        _NEVER,
        _always(CPU),
    ),
    Patch(
        "torch.cuda:synchronize",
        "pipeline p2p, the checkpoint writer and its asynchronous queue wait for the device",
        _NEVER,
        _always(None),
    ),
    *(
        Patch(
            f"torch:{name}",
            f'torch.{name}(device="cuda") and pin_memory are written into schedules, optimizer, '
            "gradient clipping and rotary embeddings",
            _NEVER,
            _factory_on_cpu,
        )
        for name in _FACTORIES
    ),
    Patch(
        "torch:Tensor.cuda",
        "optimizer state, tied embeddings and rotary slices are moved with .cuda()",
        _NEVER,
        _replaced_by(_itself),
    ),
    Patch("torch.nn:Module.cuda", "models are moved with .cuda()", _NEVER, _replaced_by(_itself)),
    Patch(
        "torch:Tensor.type",
        "both optimizers and gradient clipping compare it with 'torch.cuda.FloatTensor'",
        "the optimizers compare dtypes instead",
        _type_with_cuda_name,
    ),
    Patch("torch.cuda:get_rng_state", _RNG, _RNG_DROP, _replaced_by(_rng_state)),
    Patch("torch.cuda.random:get_rng_state", _RNG, _RNG_DROP, _replaced_by(_rng_state)),
    Patch("torch.cuda:set_rng_state", _RNG, _RNG_DROP, _replaced_by(_restore_rng_state)),
    Patch("torch.cuda.random:set_rng_state", _RNG, _RNG_DROP, _replaced_by(_restore_rng_state)),
    Patch("torch.cuda:manual_seed", _RNG, _RNG_DROP, _replaced_by(_seed)),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _RNG,
        _RNG_DROP,
        _replaced_by(_restore_rng_state),
    ),
    Patch("torch.cuda:Stream", _STREAM, _STREAM_DROP, _replaced_by(CpuStream)),
    Patch("torch.cuda:Event", _STREAM, _STREAM_DROP, _replaced_by(CpuEvent)),
    Patch("torch.cuda:stream", _STREAM, _STREAM_DROP, _replaced_by(_stream_context)),
    Patch("torch.cuda:current_stream", _STREAM, _STREAM_DROP, _always(CpuStream())),
    Patch("torch.cuda:default_stream", _STREAM, _STREAM_DROP, _always(CpuStream())),
    Patch("torch:Tensor.record_stream", _STREAM, _STREAM_DROP, _always(None)),
    Patch(
        f"{_DISTRIBUTED}.sharded_state_dict",
        "with torch's Adam it asserts that a step was taken, also when it is about to load one",
        "the assertion is skipped while loading",
        _loads_into_fresh_state,
    ),
    Patch(
        f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
        "it copies torch Adam's step from tensors that its callers have stripped of it",
        "it skips the step as its callers do",
        _keeps_step,
    ),
    Patch(
        f"{_DISTRIBUTED}.load_state_dict",
        "it gives every parameter one step tensor, which torch's Adam then advances once for each",
        "it makes a step tensor for each parameter",
        _unshares_step,
    ),
)

_BENIGN_WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    # Said at import by modules whose choice models/backend.py makes, and the doctor prints.
    ("Transformer Engine and Apex are not installed", UserWarning),
    ("Apex is not installed", UserWarning),
    # Advice about CUDA streams.
    (".*environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1", UserWarning),
    # megatron-core still calls the collectives by the names they had before torch 2.13.
    (
        r".*torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is dep",
        FutureWarning,
    ),
    # So do the reader and the planner of its checkpoints.
    ("`load_state_dict` is deprecated and will be removed", FutureWarning),
    ("Please use DTensor instead and we are deprecating ShardedTensor", FutureWarning),
    # The distributed optimizer probes its shards, which are views, for a gradient of their own.
    (r"The \.grad attribute of a Tensor that is not a leaf", UserWarning),
)

_BENIGN_LOG = "CPU RNG state changed within GPU RNG context"
"""Said by every ``fork`` once CUDA's random state is the CPU's."""

_installed = False


def install() -> bool:
    """Apply ``PATCHES`` once, before megatron-core is first used; True if they are in force.

    Does nothing where CUDA is present. Raises ``ShimError`` if an upstream name has moved; nothing
    has been patched then.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return _installed
    for message, category in _BENIGN_WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category)
    for patch in PATCHES:
        patch.owner()
    # torch lists the factories that ``with torch.device(...)`` redirects once, by identity: list
    # the originals, or a context (that of transformers' loader, for one) would redirect nothing.
    _device_constructors()
    for patch in PATCHES:
        patch.apply()
    logging.getLogger("megatron.core.tensor_parallel.random").addFilter(
        lambda record: _BENIGN_LOG not in record.getMessage()
    )
    _installed = True
    return True
