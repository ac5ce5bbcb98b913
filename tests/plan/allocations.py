"""What megatron-core's own modules allocate on one rank of any layout, in one process.

torch's ``fake`` process group answers every collective at once and moves nothing, so a single
process builds and runs the modules of any rank of any layout at their true local shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_curr.models.gpt import build_gpt_chunks
from megatron_curr.models.layout_settings import PRECISIONS
from megatron_curr.models.video_dit import build_video_dit_chunks
from megatron_curr.parallel.data_parallel import wrap_for_data_parallel
from megatron_curr.parallel.groups import Groups, build_groups, destroy_groups
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.training.optimizer_state import fill_missing_state, start_average
from tests.models.videos import videos

NUM_SAMPLES = 2


@dataclass(frozen=True)
class Setting:
    """A rank of a layout, and what it computes."""

    model: Model | VideoDiT
    parallel: Parallel
    rank: int = 0
    world_size: int = 1
    precision: str = "bf16"
    isolate_documents: bool = False
    vocab_size: int = 256
    seq_length: int = 64
    latent_shape: tuple[int, int, int] = (4, 8, 24)  # of video
    keeps_average: bool = False


@dataclass
class Allocated:
    """Bytes."""

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    saved: list[int] = field(default_factory=list)  # for the backward pass, by chunk
    sent: Counter[str] = field(default_factory=Counter)  # of messages, by collective


@contextmanager
def fake_ranks(setting: Setting) -> Iterator[Groups]:
    """This process as one rank among many that do not exist."""
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=setting.rank, world_size=setting.world_size)
    try:
        yield build_groups(setting.parallel)
    finally:
        destroy_groups()  # or whatever this process does next finds them
        dist.destroy_process_group()


def allocated(setting: Setting, *, with_optimizer: bool = False) -> Allocated:
    """Build the rank's chunks, run each forwards, and count what is held."""
    found = Allocated()
    with fake_ranks(setting) as groups:
        chunks = build_chunks(setting, groups)
        found.parameters = _storage_bytes(p for chunk in chunks for p in chunk.parameters())
        buffers = [b for chunk in chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        found.gradients = _storage_bytes(buffer.grad_data for buffer in buffers)
        if with_optimizer:
            found.optimizer = _optimizer_bytes(setting, chunks)
        for chunk in chunks:
            with saved_bytes(chunk) as saved:
                forward(setting, chunk, groups)
            found.saved.append(sum(saved.values()))
    return found


def build_chunks(setting: Setting, groups: Groups) -> list[DistributedDataParallel]:
    how = {
        "parallel": setting.parallel,
        "precision": setting.precision,
        "groups": groups,
    }
    if isinstance(setting.model, VideoDiT):
        chunks = build_video_dit_chunks(setting.model, **how)
    else:
        chunks = build_gpt_chunks(
            setting.model,
            **how,
            vocab_size=setting.vocab_size,
            isolate_documents=setting.isolate_documents,
        )
    return wrap_for_data_parallel(chunks, parallel=setting.parallel)


def forward(setting: Setting, chunk: DistributedDataParallel, groups: Groups) -> Tensor:
    """One micro-batch of random tokens through a chunk; what comes from other stages is zero."""
    parallel, model = setting.parallel, setting.model
    if isinstance(model, VideoDiT):
        clips = videos(model, *setting.latent_shape, samples=tuple(range(NUM_SAMPLES)))
        predicted: Tensor = chunk(**clips.arguments())
        return predicted
    length = setting.seq_length // groups.cp_size
    tokens = torch.randint(
        setting.vocab_size, (NUM_SAMPLES, length), generator=torch.Generator().manual_seed(0)
    )
    inner = chunk.module
    if not inner.pre_process:
        rows = length // groups.tp_size if parallel.sequence_parallel else length
        shape = (rows, NUM_SAMPLES, model.hidden_size)
        inner.set_input_tensor(
            torch.zeros(shape, dtype=PRECISIONS[setting.precision], requires_grad=True)
        )
    documents = None
    if setting.isolate_documents:
        documents = (torch.arange(setting.seq_length) >= 20).long().expand(NUM_SAMPLES, -1)
    output: Tensor = chunk(tokens, None, documents, labels=tokens)
    return output


@contextmanager
def saved_bytes(chunk: DistributedDataParallel) -> Iterator[dict[int, int]]:
    """Storages that autograd saves, by address; the chunk's weights are not among them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in chunk.parameters()}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # an address stays taken

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen


def _optimizer_bytes(setting: Setting, chunks: list[DistributedDataParallel]) -> int:
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=0.0,
            bf16=setting.precision == "bf16",
            params_dtype=PRECISIONS[setting.precision],
            use_distributed_optimizer=setting.parallel.use_distributed_optimizer,
        ),
        chunks,
        use_gloo_process_groups=False,
    )
    fill_missing_state(optimizer)
    if setting.keeps_average:
        start_average(optimizer)
    held = [
        tensor
        for part in optimizer.chained_optimizers
        for group in part.optimizer.param_groups
        for main in group["params"]
        for tensor in (main, *part.optimizer.state[main].values())
        if isinstance(tensor, Tensor)
    ]
    model = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    return _storage_bytes(t for t in held if t.untyped_storage().data_ptr() not in model)


def _storage_bytes(tensors: Any) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class SentBytes(TorchDispatchMode):
    """Counts what a rank sends in collectives, as rings and pairwise exchanges would send it."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("c10d::").rstrip("_")
        if func.namespace == "c10d":
            self.by_name[name] += _sent(name, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Any) -> int:
    """Bytes that one rank sends: of a gather its own part to each other rank, and so on."""
    tensors = [args[0]] if isinstance(args[0], Tensor) else args[0]
    first = sum(t.nbytes for t in tensors if isinstance(t, Tensor))
    if name == "send":
        return first
    if name in {"allreduce", "_allgather_base", "_reduce_scatter_base", "alltoall_base"}:
        group = next(dist.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
        size = group.size()
        if name == "_allgather_base":
            return first * (size - 1) // size
        if name == "_reduce_scatter_base":
            return first * (size - 1)
        return first * (size - 1) // size * (2 if name == "allreduce" else 1)
    return 0
