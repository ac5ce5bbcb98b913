"""The bias that balances experts moves with the updates, and only with them."""

from __future__ import annotations

import math

import torch

from megatron_curr.data.loader import Batch
from megatron_curr.models.experts import expert_biases
from megatron_curr.models.gpt import build_gpt_chunks
from megatron_curr.parallel.groups import build_groups
from megatron_curr.training.objectives import NextToken
from megatron_curr.training.step import Loss, Stepper
from tests.parallel.layouts import VOCAB_SIZE, batch_of, build_optimizer, layout, tiny_model, wrap
from tests.ranks import run_ranks


def refused_update_leaves_the_bias(rank: int) -> None:
    parallel = layout()
    groups = build_groups(parallel)
    model = tiny_model(
        num_layers=1,
        num_moe_experts=4,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
    )
    chunks = build_gpt_chunks(
        model,
        parallel=parallel,
        precision="fp32",
        groups=groups,
        vocab_size=VOCAB_SIZE,
        isolate_documents=False,
    )
    ddp = wrap(chunks, parallel)
    optimizer = build_optimizer(ddp, parallel, precision="fp32")
    stepper = Stepper(
        ddp, optimizer, groups=groups, objective=NextToken(groups), num_groups=1, clip_grad=1.0
    )
    rows = batch_of([0], isolate_documents=False)
    batch = Batch(
        tokens_BS=rows["tokens"],
        labels_BS=rows["labels"],
        loss_mask_BS=rows["loss_mask"],
        document_ids_BS=None,
        source_index_B=torch.zeros(1, dtype=torch.int64),
        positions_B=torch.zeros(1, dtype=torch.int64),
        identities_B=torch.zeros(1, dtype=torch.int64),
    )
    (bias,) = expert_biases(ddp)
    stepper.forward_backward([batch])
    assert bias.any()
    not_a_number = Loss(sum_by_group=(math.nan,), count_by_group=(1,))
    assert not stepper.update(None, not_a_number).applied
    assert not bias.any()


def test_refused_update_leaves_the_bias_as_it_was() -> None:
    run_ranks(refused_update_leaves_the_bias, 1)
