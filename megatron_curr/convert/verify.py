"""Proof that a Hugging Face folder and a checkpoint are one model: the same tokens through both.

Ours is built by megatron-core on one rank and loaded by megatron-core's own loader, theirs by
transformers, so nothing of the conversion is trusted. Legend: B samples, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)
from megatron_curr.convert.export import heldout_sets
from megatron_curr.convert.published import DTYPES, open_published
from megatron_curr.convert.source import Source
from megatron_curr.convert.stored import open_stored
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel

# Largest logit difference that rounding explains. Both models compute in fp32, so the same bits
# give the same logits up to the order of sums, which grows with the logits; bits that were rounded
# on the way differ by what the published dtype rounds.
SAME_BITS, SAME_BITS_FRAC = 1e-4, 2e-5
ROUNDED = {"F64": 1e-4, "F32": 1e-4, "BF16": 0.25, "F16": 0.05}
_EMBEDDING = "embedding.word_embeddings.weight"
_BYTES_PER_WEIGHT = 4 * 2 + 1  # both models in fp32, and room for activations
# A family whose class does not come with transformers.
FOREIGN = ("TeleChat2ForCausalLM",)


@dataclass(frozen=True)
class Agreement:
    """How near two models are on the same tokens."""

    num_tokens: int
    largest_logit_difference: float
    mean_logit_difference: float
    same_next_token_frac: float
    perplexity: float
    """Of the Hugging Face model; of held-out text, where there is any."""
    perplexity_of_ours: float
    tolerance: float

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the largest difference."""
        return self.largest_logit_difference <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{self.num_tokens:,} tokens through both models: logits differ by "
            f"{self.largest_logit_difference:.2g} at most ({self.tolerance:g} allowed) and "
            f"{self.mean_logit_difference:.2g} on average, next token the same in "
            f"{self.same_next_token_frac:.2%}, perplexity {self.perplexity:.4f} and "
            f"{self.perplexity_of_ours:.4f} (ours)"
        )


def reason_not_to_verify(source: Source, *, num_parameters: int, architecture: str) -> str | None:
    """Why the two models are not compared; None when they can be."""
    if architecture in FOREIGN:
        return f"{architecture} is not part of transformers"
    needed, free = num_parameters * _BYTES_PER_WEIGHT, psutil.virtual_memory().available
    if needed > free:
        return f"both models need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
    return None


def verify(hf_folder: Path, checkpoint: Path, source: Source) -> Agreement:
    """As ``compare``; raises ``CheckpointError`` with the numbers when they are two models."""
    agreement = compare(hf_folder, checkpoint, source)
    if not agreement.is_close:
        raise CheckpointError(f"{hf_folder.name}: is not the model of {checkpoint}: {agreement}")
    return agreement


def compare(hf_folder: Path, checkpoint: Path, source: Source) -> Agreement:
    """The folder's model and the checkpoint's, on held-out text of the run if it has any."""
    tokens_BS = heldout_tokens(source)
    theirs_BSV = published_logits(hf_folder, tokens_BS)
    ours_BSV = megatron_logits(checkpoint, source.model, tokens_BS)[..., : theirs_BSV.shape[-1]]
    difference_BSV = (theirs_BSV - ours_BSV).abs()
    same_BS = theirs_BSV.argmax(dim=-1) == ours_BSV.argmax(dim=-1)
    return Agreement(
        num_tokens=tokens_BS.numel(),
        largest_logit_difference=float(difference_BSV.max()),
        mean_logit_difference=float(difference_BSV.mean()),
        same_next_token_frac=float(same_BS.double().mean()),
        perplexity=_perplexity(theirs_BSV, tokens_BS),
        perplexity_of_ours=_perplexity(ours_BSV, tokens_BS),
        tolerance=_tolerance(hf_folder, checkpoint, theirs_BSV),
    )


def heldout_tokens(source: Source, *, num_samples: int = 4) -> Tensor:
    """[B, S] ids from the start of every source's held-out text; without any, drawn at random."""
    seq_length = min(source.model.max_position_embeddings, 1024)
    rows = []
    for shards in heldout_sets(source.run.recipe).values() if source.run else ():
        count = min(num_samples, shards.num_tokens // seq_length) * seq_length
        rows.append(shards.read(0, count).astype(np.int64).reshape(-1, seq_length))
    if sum(len(row) for row in rows):
        return torch.from_numpy(np.concatenate(rows))
    drawn = np.random.default_rng(0).integers(source.vocab_size, size=(num_samples, seq_length))
    return torch.from_numpy(drawn)


@torch.no_grad()
def published_logits(hf_folder: Path, tokens_BS: Tensor) -> Tensor:
    """[B, S, V] logits of the Hugging Face model, computed and returned in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        hf_folder, local_files_only=True, dtype=torch.float32
    ).eval()
    return torch.cat([model(row[None]).logits for row in tokens_BS])


@torch.no_grad()
def megatron_logits(checkpoint: Path, model: Model, tokens_BS: Tensor) -> Tensor:
    """[B, S, V padded] logits of the checkpoint's model on one rank, in fp32."""
    from megatron_curr.models.gpt import build_gpt
    from megatron_curr.parallel.groups import build_groups, destroy_groups, one_rank

    # The number of rows is the checkpoint's, whatever layout padded it.
    num_rows = open_stored(checkpoint).shape(_EMBEDDING)[0]
    unpadded = model.model_copy(update={"make_vocab_size_divisible_by": 1})
    parallel = Parallel(micro_batch_tokens=tokens_BS.shape[1])
    with one_rank():
        groups = build_groups(parallel)
        try:
            gpt = build_gpt(
                unpadded,
                parallel=parallel,
                precision="fp32",
                groups=groups,
                vocab_size=num_rows,
                isolate_documents=False,
                seed=None,
            ).eval()
            load_stored(gpt, checkpoint)
            positions_BS = torch.arange(tokens_BS.shape[1])[None]
            return torch.cat([gpt(row[None], positions_BS, None) for row in tokens_BS]).float()
        finally:
            destroy_groups()


def load_stored(gpt: Any, checkpoint: Path) -> None:
    """Load weights alone, by megatron-core's loader. Raises ``CheckpointError``; collective."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from megatron_curr.training.checkpoint_shapes import check_architecture

    request = {"model": gpt.sharded_state_dict()}
    check_architecture(checkpoint, request)
    # Names and shapes are checked; what a converted checkpoint lacks is `_extra_state`.
    loaded = dist_checkpointing.load(
        request, str(checkpoint), strict=StrictHandling.RETURN_ALL, validate_access_integrity=False
    )[0]
    gpt.load_state_dict(loaded["model"], strict=False)


def _perplexity(logits_BSV: Tensor, tokens_BS: Tensor) -> float:
    loss = cross_entropy(logits_BSV[:, :-1].flatten(0, 1), tokens_BS[:, 1:].flatten())
    return math.exp(min(float(loss), 700.0))


def _tolerance(hf_folder: Path, checkpoint: Path, logits_BSV: Tensor) -> float:
    sizes: dict[torch.dtype, int] = {}
    for tensor in open_published(hf_folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    published = max(sizes, key=lambda dtype: sizes[dtype])
    if published == open_stored(checkpoint).dtype(_EMBEDDING):
        return SAME_BITS + SAME_BITS_FRAC * float(logits_BSV.abs().max())
    return next(ROUNDED[name] for name, dtype in DTYPES.items() if dtype == published)
