"""Experts, their router's bias and their moments keep their bits from layout to layout."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import load_plain_tensors

from megatron_curr.models.gpt import build_gpt_chunks
from megatron_curr.parallel.data_parallel import finish_param_gather
from megatron_curr.parallel.groups import build_groups, destroy_groups
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.schema import Checkpoint
from megatron_curr.training.checkpoint import Checkpointer
from megatron_curr.training.checkpoint_folder import RunState, list_checkpoints
from tests.parallel.layouts import (
    VOCAB_SIZE,
    build_optimizer,
    forward_backward,
    layout,
    tiny_model,
    wrap,
)
from tests.ranks import run_ranks

MODEL = tiny_model(
    num_layers=2,
    num_moe_experts=4,
    moe_ffn_hidden_size=48,
    moe_layer_freq=2,
    moe_shared_expert_intermediate_size=32,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
)
LATE = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# The first takes a step and saves; each loads what the one before it saved, and saves it again.
LAYOUTS = {
    "ep2 dp2, weights gathered late": layout(ep=2, distributed_optimizer=True, **LATE),
    "tp2 sp": layout(tp=2, sequence_parallel=True),
    "dp2, weights gathered late": layout(distributed_optimizer=True, **LATE),
    "tp2 ep2 sp, experts whole": layout(tp=2, ep=2, etp=1, sequence_parallel=True),
    "pp2": layout(pp=2),
}
STATE = RunState(
    consumed_tokens=1,
    step=1,
    optimizer_step=1,
    ledger_head="",
    recipe_fingerprint="",
    sources={},
    nonfinite_steps=0,
    nonfinite_in_a_row=0,
    keep=False,
    layout={},
    versions={},
)


def pass_on(rank: int, root: Path) -> None:
    saved = None
    for name, parallel in LAYOUTS.items():
        saved = load_and_save(parallel, saved, root / name)
    dist.barrier()
    folders = {name: list_checkpoints(root / name)[-1] for name in LAYOUTS}
    first, *others = (load_plain_tensors(str(folder)) for folder in folders.values())
    assert first["decoder.layers.0.mlp.router.expert_bias"].any()
    assert first["decoder.layers.0.mlp.experts.experts.linear_fc2.weight"].shape == (4, 64, 48)
    for name, other in zip(list(LAYOUTS)[1:], others, strict=True):
        assert other.keys() == first.keys(), name
        for key, tensor in first.items():
            same = torch.equal(tensor, other[key]) if torch.is_tensor(tensor) else True
            assert same, f"{key} on {name}"


def load_and_save(parallel: Parallel, saved: Path | None, place: Path) -> Path:
    groups = build_groups(parallel)
    chunks = build_gpt_chunks(
        MODEL,
        parallel=parallel,
        precision="fp32",
        groups=groups,
        vocab_size=VOCAB_SIZE,
        isolate_documents=False,
    )
    ddp = wrap(chunks, parallel)
    optimizer = build_optimizer(ddp, parallel, precision="fp32")

    def checkpointer(folder: Path) -> Checkpointer:
        return Checkpointer(
            folder,
            chunks=chunks,
            optimizer=optimizer,
            pg_collection=groups.pg_collection,
            settings=Checkpoint(every_tokens=1),
            finish_weights=lambda: finish_param_gather(ddp),
        )

    if saved is None:
        forward_backward(ddp, groups, step=0, isolate_documents=False)
        optimizer.step()
    else:
        state, passed_over = checkpointer(saved).load_newest()
        assert state is not None and not passed_over
    report = checkpointer(place).save(STATE)
    assert report.error is None, report.error
    destroy_groups()
    return place


def test_experts_move_between_layouts(tmp_path: Path) -> None:
    run_ranks(pass_on, 2, tmp_path)
