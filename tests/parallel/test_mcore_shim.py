from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
)

from megatron_curr.errors import ShimError
from megatron_curr.models.gpt import build_gpt_chunks
from megatron_curr.parallel import mcore_shim
from megatron_curr.parallel.groups import build_groups, destroy_groups
from tests.parallel.layouts import VOCAB_SIZE, build_optimizer, layout, tiny_model, wrap
from tests.ranks import run_ranks

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")


def moved(target: str) -> mcore_shim.Patch:
    return mcore_shim.Patch(target, "a test asks", "the test is gone", lambda original: None)


@pytest.mark.parametrize(
    "target", ["torch.cuda:no_such_name", "torch:Tensor.no_such_name", "megatron.core.gone:name"]
)
def test_a_moved_name_fails_before_anything_is_patched(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mcore_shim, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(mcore_shim, "PATCHES", (*mcore_shim.PATCHES, moved(target)))
    before = torch.zeros
    with pytest.raises(ShimError, match=f"{target}.*a test asks.*the test is gone"):
        mcore_shim.install()
    assert torch.zeros is before


def test_nothing_is_touched_where_cuda_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcore_shim, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.zeros
    assert not mcore_shim.install()
    assert torch.zeros is before


@needs_no_cuda
def test_installing_twice_wraps_once() -> None:
    before = torch.zeros
    assert mcore_shim.install()
    assert torch.zeros is before


def test_every_patch_says_why_and_until_when() -> None:
    targets = [patch.target for patch in mcore_shim.PATCHES]
    assert len(set(targets)) == len(targets)
    assert all(patch.why and patch.drop_when for patch in mcore_shim.PATCHES)


@needs_no_cuda
def test_cuda_tensors_land_on_the_cpu() -> None:
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.tensor([1], device=torch.device("cuda", 0), pin_memory=True).tolist() == [1]
    assert torch.empty(3, device=torch.cuda.current_device()).cuda().device.type == "cpu"
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.float64).dtype is torch.float64


def forked_states_are_apart(rank: int) -> None:
    build_groups(layout(tp=2), seed=3)
    outside = torch.get_rng_state()
    with get_cuda_rng_tracker().fork():
        first = torch.rand(4)
    with get_cuda_rng_tracker().fork():
        second = torch.rand(4)
    assert torch.equal(torch.get_rng_state(), outside)
    both = [torch.empty(4), torch.empty(4)]
    torch.distributed.all_gather(both, first)
    assert not torch.equal(first, second)
    assert not torch.equal(both[0], both[1])


@needs_no_cuda
def test_random_states_of_tensor_ranks_are_apart() -> None:
    run_ranks(forked_states_are_apart, 2)


def uneven_parts_travel(rank: int) -> None:
    group = torch.distributed.group.WORLD
    rows = [3, 0]
    mine = torch.full((rows[rank], 2), float(rank + 1), requires_grad=True)
    whole = gather_from_sequence_parallel_region(mine, group=group, output_split_sizes=rows)
    assert whole.tolist() == [[1.0, 1.0]] * 3
    whole.backward(torch.arange(6.0).view(3, 2))  # summed over both ranks, and cut
    expected = torch.arange(6.0).view(3, 2) * 2
    assert torch.equal(mine.grad, expected[: rows[rank]])


@needs_no_cuda
def test_uneven_parts_travel_on_gloo() -> None:
    run_ranks(uneven_parts_travel, 2)


def build(parallel):
    groups = build_groups(parallel)
    chunks = build_gpt_chunks(
        tiny_model(num_layers=1),
        parallel=parallel,
        precision="bf16",
        groups=groups,
        vocab_size=VOCAB_SIZE,
        isolate_documents=False,
    )
    ddp = wrap(chunks, parallel)
    return groups, chunks[0], build_optimizer(ddp, parallel, precision="bf16")


def sharded(groups, chunk, optimizer, *, is_loading: bool):
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": groups.pg_collection.dp_cp,
    }
    model = chunk.sharded_state_dict(metadata=metadata)
    return {
        "model": model,
        "optimizer": optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata),
    }


def step_of(chunk, optimizer) -> dict[str, torch.Tensor]:
    for parameter in chunk.parameters():
        parameter.main_grad.fill_(1e-3)
    optimizer.step()
    return {name: weight.detach().clone() for name, weight in chunk.named_parameters()}


def optimizer_goes_on_after_loading(rank: int, folder: Path) -> None:
    parallel = layout(distributed_optimizer=True)
    groups, chunk, optimizer = build(parallel)
    step_of(chunk, optimizer)
    dist_checkpointing.save(sharded(groups, chunk, optimizer, is_loading=False), str(folder))
    expected = step_of(chunk, optimizer)
    destroy_groups()

    groups, chunk, optimizer = build(parallel)
    state = dist_checkpointing.load(sharded(groups, chunk, optimizer, is_loading=True), str(folder))
    chunk.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loaded = step_of(chunk, optimizer)
    assert all(torch.equal(loaded[name], weight) for name, weight in expected.items())
    inner = optimizer.chained_optimizers[0].optimizer
    assert {float(state["step"]) for state in inner.state.values()} == {2.0}


@needs_no_cuda
def test_distributed_optimizer_goes_on_after_loading(tmp_path: Path) -> None:
    run_ranks(optimizer_goes_on_after_loading, 1, tmp_path)


@needs_no_cuda
def test_gradient_norm_counts_small_entries_beside_large_ones() -> None:
    gradient = torch.full((8192, 192), 1e-4)
    gradient[0] = 1.0  # squares of the rest are lost where they are added to its own in float32
    exact = gradient.double().norm().item()
    assert abs(gradient.norm().item() / exact - 1) > 1e-5  # torch's own, what the shim mends
    run_ranks(norm_is, 1, gradient, exact)


def norm_is(rank: int, gradient: torch.Tensor, exact: float) -> None:
    norm = get_grad_norm_fp32([gradient], grad_stats_parallel_group=None)
    assert norm == pytest.approx(exact, rel=1e-6)
