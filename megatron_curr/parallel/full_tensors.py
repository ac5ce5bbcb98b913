"""Where a rank's part of a parameter lies in the full one, and back again.

A parameter is named by its place in the whole model (``decoder.layers.7...`` counts from the first
pipeline stage, ``experts.local_experts.5`` from the layer's first expert) and cut along at most one
dim, over the tensor axis or, an expert, over the expert tensor axis. A stride of n means that the
full dim is n equal stacks and every rank holds its part of each: SwiGLU's fc1 is [gate; up] on
every rank. The fused query-key-value weight needs no stride: its rows are ordered by query group.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_curr.parallel.data_parallel import finish_param_gather
from megatron_curr.parallel.groups import Groups

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
EXPERTS = ".mlp.experts."
_LOCAL_EXPERT = re.compile(r"(local_experts\.)(\d+)(\..*)")
# Transformer Engine keeps a stage's experts in one module: linear_fc1.weight5 is expert 5's weight.
_GROUPED_EXPERT = re.compile(r"(linear_fc[12]\.(?:weight|bias))(\d+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """How a parameter is cut over its axis; ``dim`` None means that every rank has all."""

    dim: int | None
    stride: int = 1

    def part(self, full: Tensor, *, rank: int, size: int) -> Tensor:
        """Rank ``rank``'s part of the full tensor."""
        if self.dim is None:
            return full
        stacks = full.chunk(self.stride, dim=self.dim)
        return torch.cat([stack.chunk(size, dim=self.dim)[rank] for stack in stacks], dim=self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The full tensor from every rank's part, in rank order."""
        if self.dim is None:
            return parts[0]
        stacks = [part.chunk(self.stride, dim=self.dim) for part in parts]
        return torch.cat(
            [torch.cat(stack, dim=self.dim) for stack in zip(*stacks, strict=True)], dim=self.dim
        )

    def full_shape(self, part_shape: Sequence[int], size: int) -> tuple[int, ...]:
        """Shape of the full tensor, given a part's."""
        return tuple(
            length * size if dim == self.dim else length for dim, length in enumerate(part_shape)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The ranks that a parameter is cut over, and this rank's place among them."""

    rank: int
    size: int
    group: dist.ProcessGroup


def axis_of(name: str, groups: Groups) -> Axis:
    """The axis of the parameter of this full name."""
    if EXPERTS in name:
        return Axis(rank=groups.etp_rank, size=groups.etp_size, group=groups.pg_collection.expt_tp)
    return Axis(rank=groups.tp_rank, size=groups.tp_size, group=groups.pg_collection.tp)


def cut_of(parameter: nn.Parameter) -> Cut:
    """The cut megatron-core (or Transformer Engine) has marked on the parameter."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return Cut(dim=None)
    return Cut(dim=parameter.partition_dim, stride=parameter.partition_stride)


def named_full_parameters(chunk: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of one pipeline chunk under the names they have in the whole model.

    ``chunk`` is a GPTModel or a wrapper of one with a ``module``. The last stage's copy of tied
    embeddings goes by the embeddings' name.
    """
    while not hasattr(chunk, "decoder"):
        chunk = chunk.module
    tied = chunk.share_embeddings_and_output_weights
    for name, parameter in chunk.named_parameters():
        if name == OUTPUT_LAYER and tied:
            name = WORD_EMBEDDINGS
        if name.startswith("decoder.layers."):
            prefix, layers, local_index, rest = name.split(".", 3)
            layer = chunk.decoder.layers[int(local_index)]
            name = f"{prefix}.{layers}.{layer.layer_number - 1}.{_with_global_expert(rest, layer)}"
        yield name, parameter


def _with_global_expert(name: str, layer: nn.Module) -> str:
    """A name inside a layer, its expert counted from the layer's first on any rank."""
    place, mark, inner = name.partition("mlp.experts.")
    if not mark:
        return name
    every = layer.mlp.local_expert_indices
    if match := _LOCAL_EXPERT.fullmatch(inner):
        inner = f"{match[1]}{every[int(match[2])]}{match[3]}"
    elif match := _GROUPED_EXPERT.fullmatch(inner):
        inner = f"local_experts.{every[int(match[2])]}.{match[1]}"
    return f"{place}{mark}{inner}"


def full_parameters(chunks: Sequence[nn.Module], groups: Groups) -> dict[str, Tensor]:
    """Every parameter of the whole model, on every rank, on the CPU. Collective; small models."""
    finish_param_gather(chunks)
    named = [pair for chunk in chunks for pair in named_full_parameters(chunk)]
    return _gather(
        {name: (parameter.detach(), cut_of(parameter)) for name, parameter in named}, groups
    )


def full_gradients(chunks: Sequence[nn.Module], groups: Groups) -> dict[str, Tensor]:
    """Every parameter's finalized gradient, whole, on every rank, on the CPU.

    ``chunks`` are DistributedDataParallel; call between ``finalize_model_grads`` and the step of
    the optimizer. Under the distributed optimizer a rank holds the reduced gradient of its own
    shard only: the shards are gathered into a copy of each bucket first. Collective; small models.
    """
    mine: dict[str, tuple[Tensor, Cut]] = {}
    for chunk in chunks:
        gradients = _reduced_gradients(chunk)
        for name, parameter in named_full_parameters(chunk):
            mine[name] = (gradients[parameter], cut_of(parameter))
    return _gather(mine, groups)


def unequal_replicas(chunks: Sequence[nn.Module], groups: Groups) -> list[str]:
    """Names of parameters of which two ranks that should hold the same bits do not. Collective."""
    finish_param_gather(chunks)
    digests: dict[tuple[str, int], set[str]] = {}
    mine = {}
    for chunk in chunks:
        for name, parameter in named_full_parameters(chunk):
            part = axis_of(name, groups).rank if cut_of(parameter).dim is not None else 0
            raw = parameter.detach().cpu().contiguous().view(torch.uint8).numpy()
            mine[name, part] = hashlib.blake2b(raw, digest_size=16).hexdigest()
    everyone: list[dict[tuple[str, int], str] | None] = [None] * groups.world_size
    dist.all_gather_object(everyone, mine)
    for other in everyone:
        for key, digest in (other or {}).items():
            digests.setdefault(key, set()).add(digest)
    return sorted({name for (name, _), seen in digests.items() if len(seen) > 1})


def _reduced_gradients(chunk: nn.Module) -> dict[nn.Parameter, Tensor]:
    if not chunk.ddp_config.use_distributed_optimizer:
        return {parameter: parameter.main_grad for parameter in chunk.parameters()}
    gradients: dict[nn.Parameter, Tensor] = {}
    for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shard = bucket.grad_data.chunk(group.size())[group.rank()].contiguous()
            shards = [torch.empty_like(shard) for _ in range(group.size())]
            dist.all_gather(shards, shard, group=group)
            flat = torch.cat(shards)
            for parameter in bucket.params:
                start, end, _ = buffer.param_index_map[parameter]
                gradients[parameter] = flat[start - bucket.offset : end - bucket.offset].view(
                    parameter.shape
                )
    return gradients


def _gather(mine: Mapping[str, tuple[Tensor, Cut]], groups: Groups) -> dict[str, Tensor]:
    """Join cut tensors, then collect the experts and the stages from the ranks that hold them."""
    whole: dict[str, Tensor] = {}
    for name, (part, cut) in mine.items():
        part, axis = part.detach().contiguous(), axis_of(name, groups)
        if cut.dim is not None and axis.size > 1:
            parts = [torch.empty_like(part) for _ in range(axis.size)]
            dist.all_gather(parts, part, group=axis.group)
            part = cut.join(parts)
        whole[name] = part.cpu().clone()
    if groups.ep_size > 1:
        whole = _collect(whole, groups.pg_collection.ep)
    return _collect(whole, groups.pg_collection.pp) if groups.pp_size > 1 else whole


def _collect(mine: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    everyone: list[dict[str, Tensor] | None] = [None] * group.size()
    dist.all_gather_object(everyone, mine, group=group)
    whole: dict[str, Tensor] = {}
    for other in everyone:
        for name, tensor in (other or {}).items():
            whole.setdefault(name, tensor)
    return whole
