"""Proof that a Hugging Face folder is the checkpoint's model: the same tokens through both.

Ours is built by megatron-core on one rank and loaded by megatron-core's own loader, so nothing of
the exporter is trusted. Legend: B samples, S sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)
from megatron_curr.convert.export import heldout_sets
from megatron_curr.convert.source import Source, find_source
from megatron_curr.convert.stored import open_stored
from megatron_curr.errors import CheckpointError, DataError
from megatron_curr.recipe.parallel import Parallel

# Largest logit difference that rounding explains, by the precision of the published weights.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.25}
_EMBEDDING = "embedding.word_embeddings.weight"


@dataclass(frozen=True)
class Agreement:
    """How near two models are on the same tokens."""

    num_tokens: int
    largest_logit_difference: float
    mean_logit_difference: float
    same_next_token_frac: float
    tolerance: float

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the largest difference."""
        return self.largest_logit_difference <= self.tolerance


def verify_export(hf_folder: Path, run: Path, tokens_BS: Tensor | None = None) -> Agreement:
    """Compare the folder's model with the run's (or checkpoint's), on held-out text by default.

    Raises ``DataError`` when no held-out tokens are given or found.
    """
    source = find_source(run)
    if tokens_BS is None:
        tokens_BS = heldout_tokens(source)
    theirs_BSV = published_logits(hf_folder, tokens_BS)
    ours_BSV = megatron_logits(source, tokens_BS)[..., : theirs_BSV.shape[-1]]
    difference_BSV = (theirs_BSV - ours_BSV).abs()
    same_BS = theirs_BSV.argmax(dim=-1) == ours_BSV.argmax(dim=-1)
    return Agreement(
        num_tokens=tokens_BS.numel(),
        largest_logit_difference=float(difference_BSV.max()),
        mean_logit_difference=float(difference_BSV.mean()),
        same_next_token_frac=float(same_BS.double().mean()),
        tolerance=TOLERANCE[_stored_dtype(hf_folder)],
    )


def heldout_tokens(source: Source, *, num_samples: int = 4) -> Tensor:
    """[B, S] token ids, as many samples of every source, from the start of its held-out text."""
    seq_length = min(source.recipe.model.max_position_embeddings, 1024)
    rows = []
    for shards in heldout_sets(source.recipe).values():
        count = min(num_samples, shards.num_tokens // seq_length) * seq_length
        rows.append(shards.read(0, count).astype(np.int64).reshape(-1, seq_length))
    if not rows or not sum(len(row) for row in rows):
        raise DataError(
            f"{source.run}: no held-out text on this machine to compare the models on; name it in "
            "data.sources.<source>.heldout"
        )
    return torch.from_numpy(np.concatenate(rows))


@torch.no_grad()
def published_logits(hf_folder: Path, tokens_BS: Tensor) -> Tensor:
    """[B, S, V] logits of the Hugging Face model, computed and returned in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf_folder, local_files_only=True).float().eval()
    return torch.cat([model(row[None]).logits for row in tokens_BS])


@torch.no_grad()
def megatron_logits(source: Source, tokens_BS: Tensor) -> Tensor:
    """[B, S, V padded] logits of the checkpoint's model on one rank, in fp32."""
    from megatron.core import dist_checkpointing

    from megatron_curr.models.gpt import build_gpt
    from megatron_curr.parallel.groups import build_groups, destroy_groups

    num_rows = open_stored(source.checkpoint)[_EMBEDDING].shape[0]
    # The number of rows is the checkpoint's, whatever layout padded it.
    model = source.recipe.model.model_copy(update={"make_vocab_size_divisible_by": 1})
    parallel = Parallel(micro_batch_tokens=tokens_BS.shape[1])
    with _one_rank():
        groups = build_groups(parallel)
        try:
            gpt = build_gpt(
                model,
                parallel=parallel,
                precision="fp32",
                groups=groups,
                vocab_size=num_rows,
                isolate_documents=False,
            ).eval()
            request = {"model": gpt.sharded_state_dict()}
            loaded = dist_checkpointing.load(request, str(source.checkpoint))
            gpt.load_state_dict(loaded["model"], strict=True)
            positions_BS = torch.arange(tokens_BS.shape[1])[None]
            return torch.cat([gpt(row[None], positions_BS, None) for row in tokens_BS]).float()
        finally:
            destroy_groups()


@contextmanager
def _one_rank() -> Iterator[None]:
    """``torch.distributed`` with this process alone, as megatron-core's loader wants it."""
    if dist.is_initialized():
        if dist.get_world_size() != 1:
            raise CheckpointError("models are compared in a process of its own, on one rank")
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _stored_dtype(hf_folder: Path) -> torch.dtype:
    from safetensors import safe_open

    path = next(iter(sorted(hf_folder.glob("*.safetensors"))))
    with safe_open(path, framework="pt") as tensors:
        return tensors.get_slice(next(iter(tensors.keys())))[:1].dtype
