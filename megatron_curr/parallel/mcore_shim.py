"""Stand-ins that let megatron-core run on a machine without CUDA. The only file that patches.

megatron-core asks ``torch.cuda`` for its device, its random state and its streams, and names
``"cuda"`` in tensor factories. Where no CUDA device is present, ``install`` gives those names a CPU
meaning; where one is present it changes nothing. Every stand-in is a ``Patch`` in ``PATCHES`` that
says why it is needed and what upstream change would retire it; what takes a name's place is in
``cpu_stand_ins.py``.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_curr.errors import ShimError
from megatron_curr.parallel import cpu_stand_ins as stand_ins


@dataclass(frozen=True)
class Patch:
    """One name we assign to although we do not own it."""

    target: str
    """``module:name`` or ``module:Class.name``."""
    why: str
    drop_when: str
    make: stand_ins.Make
    may_be_missing: bool = False
    """Upstream defines the name only under conditions that do not hold here."""

    def owner(self) -> tuple[Any, str]:
        """The object that holds the name, and the name. Raises ``ShimError`` if it has moved."""
        module, _, path = self.target.partition(":")
        *parents, name = path.split(".")
        try:
            owner: Any = import_module(module)
            for parent in parents:
                owner = getattr(owner, parent)
            if not self.may_be_missing:
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
        setattr(owner, name, self.make(getattr(owner, name, None)))


def _megatron_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"megatron-core {version('megatron-core')}"
    except PackageNotFoundError:
        return "megatron-core missing"


_NEVER = "megatron-core takes its device from the tensors or groups it is given"
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")
_RNG = (
    "CudaRNGStatesTracker keeps one random state per parallel axis, on a CPU in torch's generator"
)
_RNG_DROP = "tensor_parallel.random learns CPU generators"
_STREAM = "expert and offload code makes streams and events while it builds or runs"
_STREAM_DROP = "megatron-core asks for streams only when CUDA is present"
_UNEVEN = "gloo gathers and scatters equal parts only, and experts get as many tokens as they get"
_UNEVEN_DROP = "gloo takes parts of different sizes"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"

PATCHES: tuple[Patch, ...] = (
    Patch(
        "torch.cuda:current_device",
        "every layer, buffer and collective allocates on torch.cuda.current_device()",
        _NEVER,
        stand_ins.always(stand_ins.CPU),
    ),
    Patch(
        "torch.cuda:synchronize",
        "pipeline p2p, the checkpoint writer and its asynchronous queue wait for the device",
        _NEVER,
        stand_ins.always(None),
    ),
    *(
        Patch(
            f"torch:{name}",
            f'torch.{name}(device="cuda") and pin_memory are written into schedules, optimizer, '
            "gradient clipping and rotary embeddings",
            _NEVER,
            stand_ins.factory_on_cpu,
        )
        for name in _FACTORIES
    ),
    Patch(
        "torch:Tensor.cuda",
        "optimizer state, tied embeddings and rotary slices are moved with .cuda()",
        _NEVER,
        stand_ins.replaced_by(stand_ins.itself),
    ),
    Patch(
        "torch.nn:Module.cuda",
        "models are moved with .cuda()",
        _NEVER,
        stand_ins.replaced_by(stand_ins.itself),
    ),
    Patch(
        "torch:Tensor.type",
        "both optimizers and gradient clipping compare it with 'torch.cuda.FloatTensor'",
        "the optimizers compare dtypes instead",
        stand_ins.type_with_cuda_name,
    ),
    Patch("torch.cuda:get_rng_state", _RNG, _RNG_DROP, stand_ins.replaced_by(stand_ins.rng_state)),
    Patch(
        "torch.cuda.random:get_rng_state",
        _RNG,
        _RNG_DROP,
        stand_ins.replaced_by(stand_ins.rng_state),
    ),
    Patch(
        "torch.cuda:set_rng_state",
        _RNG,
        _RNG_DROP,
        stand_ins.replaced_by(stand_ins.restore_rng_state),
    ),
    Patch(
        "torch.cuda.random:set_rng_state",
        _RNG,
        _RNG_DROP,
        stand_ins.replaced_by(stand_ins.restore_rng_state),
    ),
    Patch("torch.cuda:manual_seed", _RNG, _RNG_DROP, stand_ins.replaced_by(stand_ins.seed)),
    Patch(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        _RNG,
        _RNG_DROP,
        stand_ins.replaced_by(stand_ins.restore_rng_state),
    ),
    Patch("torch.cuda:Stream", _STREAM, _STREAM_DROP, stand_ins.replaced_by(stand_ins.CpuStream)),
    Patch("torch.cuda:Event", _STREAM, _STREAM_DROP, stand_ins.replaced_by(stand_ins.CpuEvent)),
    Patch(
        "torch.cuda:stream", _STREAM, _STREAM_DROP, stand_ins.replaced_by(stand_ins.stream_context)
    ),
    Patch(
        "torch.cuda:current_stream", _STREAM, _STREAM_DROP, stand_ins.always(stand_ins.CpuStream())
    ),
    Patch(
        "torch.cuda:default_stream", _STREAM, _STREAM_DROP, stand_ins.always(stand_ins.CpuStream())
    ),
    Patch("torch:Tensor.record_stream", _STREAM, _STREAM_DROP, stand_ins.always(None)),
    Patch(
        "megatron.core.transformer.moe.moe_utils:te_general_gemm",
        "the router asks whether it is None, and without Transformer Engine it is not defined",
        "moe_utils defines it where its import fails",
        stand_ins.replaced_by(None),
        may_be_missing=True,
    ),
    Patch(
        "megatron.core.transformer.multi_latent_attention:HAVE_TE",
        "without Transformer Engine it is true, because the names it imports exist as None, and "
        "isinstance refuses None",
        "it says whether TELinear is a class",
        stand_ins.replaced_by(False),
    ),
    Patch(
        "megatron.core.transformer.moe.token_dispatcher:all_to_all",
        "gloo wants split sizes as lists, and the dispatcher leaves those of a CPU as tensors",
        "the dispatcher turns them into lists on every device",
        stand_ins.splits_as_lists,
    ),
    Patch(
        f"{_MAPPINGS}:_gather_along_first_dim",
        _UNEVEN,
        _UNEVEN_DROP,
        stand_ins.gathers_uneven_parts,
    ),
    Patch(
        f"{_MAPPINGS}:_reduce_scatter_along_first_dim",
        _UNEVEN,
        _UNEVEN_DROP,
        stand_ins.scatters_uneven_parts,
    ),
    Patch(
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        "torch adds up a float32 norm on a CPU in float32: off by 4e-4 for the gradient of an "
        "embedding of 8192 x 192, by another amount on every layout",
        "its local norm adds up in float64",
        stand_ins.replaced_by(stand_ins.norm_summed_in_float64),
    ),
    Patch(
        f"{_DISTRIBUTED}.sharded_state_dict",
        "with torch's Adam it asserts that a step was taken, also when it is about to load one",
        "the assertion is skipped while loading",
        stand_ins.loads_into_fresh_state,
    ),
    Patch(
        f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
        "it copies torch Adam's step from tensors that its callers have stripped of it",
        "it skips the step as its callers do",
        stand_ins.keeps_step,
    ),
    Patch(
        f"{_DISTRIBUTED}.load_state_dict",
        "it gives every parameter one step tensor, which torch's Adam then advances once for each",
        "it makes a step tensor for each parameter",
        stand_ins.unshares_step,
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
