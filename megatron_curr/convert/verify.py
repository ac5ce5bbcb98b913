"""Proof that a Hugging Face folder and a checkpoint are one model: the same tokens through both.

Ours is built by megatron-core on one rank and loaded by megatron-core's own loader, theirs by
transformers, so nothing of the conversion is trusted. Where one side was rounded on the way, both
are compared as they are stored, which shows what rounding did, and once more with both rounded
alike, which shows that it was rounding alone. Legend: B samples, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import megatron_curr.parallel  # noqa: F401  (stand-ins come before megatron-core)
from megatron_curr.convert.export import heldout_sets
from megatron_curr.convert.hf_config import read_config
from megatron_curr.convert.published import open_published
from megatron_curr.convert.source import Source
from megatron_curr.convert.stored import open_stored
from megatron_curr.errors import CheckpointError
from megatron_curr.parallel.groups import Groups
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.parallel import Parallel

# Largest logit difference that rounding explains. Both models compute in fp32, so the same bits
# give the same logits up to the order of sums, which grows with the logits; bits that were rounded
# on the way differ by what the coarser dtype of the two rounds.
SAME_BITS, SAME_BITS_FRAC = 1e-4, 2e-5
ROUNDED = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.bfloat16: 0.25,
    torch.float16: 0.05,
}
_EMBEDDING = "embedding.word_embeddings.weight"
_BYTES_PER_WEIGHT = 4 * 2 + 1  # both models in fp32, and room for activations


@dataclass(frozen=True)
class Latitude:
    """By what logits may differ beyond a tolerance, where text reads the same all the same."""

    beyond_frac: float
    """Largest share of tokens."""
    same_next_token_frac: float
    perplexity_frac: float


# A token near a tie of its router takes another expert by rounding, and its logits jump. The same
# bits do so where sums in another order decide; rounded weights in every tie, layer after layer.
SWITCHED_EXPERTS = Latitude(0.1, 0.99, 0.001)
ROUNDED_WEIGHTS = Latitude(1.0, 0.75, 0.05)


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
    beyond_frac: float
    """Share of tokens with a logit further apart than ``tolerance``."""
    latitude: Latitude | None
    """What is allowed beyond it; None for the same bits without experts."""
    has_experts: bool
    rounded_alike: Agreement | None = None
    """The same of both models rounded to the coarser dtype; None where both hold the same."""

    @property
    def is_close(self) -> bool:
        """Whether rounding explains the difference, and nothing else is left of it."""
        if self.rounded_alike is not None and not self.rounded_alike.is_close:
            return False
        return self.largest_logit_difference <= self.tolerance or self._is_within_latitude()

    def _is_within_latitude(self) -> bool:
        allowed = self.latitude
        return (
            allowed is not None
            and self.beyond_frac <= allowed.beyond_frac
            and self.same_next_token_frac >= allowed.same_next_token_frac
            and abs(self.perplexity / self.perplexity_of_ours - 1) <= allowed.perplexity_frac
        )

    def __str__(self) -> str:
        told = (
            f"{self.num_tokens:,} tokens through both models: logits differ by "
            f"{self.largest_logit_difference:.2g} at most ({self.tolerance:g} allowed) and "
            f"{self.mean_logit_difference:.2g} on average, next token the same in "
            f"{self.same_next_token_frac:.2%}, perplexity {self.perplexity:.4f} and "
            f"{self.perplexity_of_ours:.4f} (ours)"
        )
        if self.beyond_frac:
            told += f"; {self.beyond_frac:.2%} of tokens differ by more"
            if self.is_close:
                told += ", which take other experts" if self.has_experts else ", by rounding"
        if self.rounded_alike:
            alike = self.rounded_alike
            told += (
                f"; both rounded alike, by {alike.largest_logit_difference:.2g} at most "
                f"({alike.tolerance:g} allowed)"
            )
            if alike.beyond_frac:
                told += f", {alike.beyond_frac:.2%} of tokens by more"
        return told


def reason_not_to_verify(source: Source, *, num_parameters: int, architecture: str) -> str | None:
    """Why the two models are not compared; None when they can be."""
    import transformers

    if not hasattr(transformers, architecture):
        return f"{architecture} is not part of transformers {transformers.__version__}"
    needed, free = num_parameters * _BYTES_PER_WEIGHT, psutil.virtual_memory().available
    if needed > free:
        return f"both models need {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free"
    return None


def verify(hf_folder: Path, checkpoint: Path, source: Source) -> Agreement:
    """As ``compare``; raises ``CheckpointError`` with the numbers when they are two models."""
    agreement = compare(hf_folder, checkpoint, source)
    if not agreement.is_close:
        raise CheckpointError(
            f"what was written is not the model of {source.path}: {agreement}; nothing is kept; "
            "--no-verify writes it all the same, to look into"
        )
    return agreement


@torch.no_grad()
def compare_first_weights(source: Source, *, num_tokens: int) -> Agreement:
    """A published folder's model and ours with its weights, as a run begins with them."""
    from megatron_curr.convert.load import load_weights

    tokens_BS = heldout_tokens(source, num_samples=1)[:, :num_tokens]
    theirs = published_model(source.path, source)
    with megatron_model(
        source.model,
        num_rows=source.vocab_size,
        seq_length=tokens_BS.shape[1],
        fill=lambda gpt, groups: load_weights(
            [gpt], source, groups=groups, vocab_size=source.vocab_size
        ),
    ) as ours:
        return _agreement(_gap(theirs, ours, tokens_BS), source.model)


@torch.no_grad()
def compare(hf_folder: Path, checkpoint: Path, source: Source) -> Agreement:
    """The folder's model and the checkpoint's, on held-out text of the run if it has any."""
    tokens_BS = heldout_tokens(source)
    stored, published = open_stored(checkpoint).dtype(_EMBEDDING), _published_dtype(hf_folder)
    coarser = max(stored, published, key=lambda dtype: torch.finfo(dtype).eps)
    theirs = published_model(hf_folder, source)
    with megatron_model(
        source.model,
        # The number of rows is the checkpoint's, whatever layout padded it.
        num_rows=open_stored(checkpoint).shape(_EMBEDDING)[0],
        seq_length=tokens_BS.shape[1],
        fill=lambda gpt, groups: load_stored(gpt, checkpoint),
    ) as ours:
        as_stored = _gap(theirs, ours, tokens_BS)
        if stored == published:
            return _agreement(as_stored, source.model)
        for model in (theirs, ours):
            round_weights(model, coarser)
        alike = _agreement(_gap(theirs, ours, tokens_BS), source.model)
    return _agreement(as_stored, source.model, rounded_to=coarser, rounded_alike=alike)


@dataclass(frozen=True)
class _Gap:
    """Both models' logits on the same tokens, in numbers."""

    differences: Tensor
    """[tokens] largest logit difference of each."""
    mean: float
    largest_logit: float
    same_next_token_frac: float
    perplexity: float
    perplexity_of_ours: float


def _gap(theirs: nn.Module, ours: nn.Module, tokens_BS: Tensor) -> _Gap:
    """One row at a time: logits of a large vocabulary are larger than both models."""
    largest, means, logits, same, losses = [], [], [], [], []
    positions_BS = torch.arange(tokens_BS.shape[1])[None]
    for row_S in tokens_BS:
        theirs_SV = theirs(row_S[None]).logits[0]
        ours_SV = ours(row_S[None], positions_BS, None)[0].float()[:, : theirs_SV.shape[-1]]
        difference_SV = (theirs_SV - ours_SV).abs()
        largest.append(difference_SV.amax(dim=-1))
        means.append(difference_SV.mean())
        logits.append(theirs_SV.abs().max())
        same.append((theirs_SV.argmax(dim=-1) == ours_SV.argmax(dim=-1)).double())
        losses.append([cross_entropy(x[:-1], row_S[1:]) for x in (theirs_SV, ours_SV)])
    theirs_loss, ours_loss = torch.tensor(losses).mean(dim=0).tolist()
    return _Gap(
        differences=torch.cat(largest),
        mean=float(torch.stack(means).mean()),
        largest_logit=float(torch.stack(logits).max()),
        same_next_token_frac=float(torch.cat(same).mean()),
        perplexity=math.exp(min(theirs_loss, 700.0)),
        perplexity_of_ours=math.exp(min(ours_loss, 700.0)),
    )


def _agreement(
    gap: _Gap,
    model: Model,
    *,
    rounded_to: torch.dtype | None = None,
    rounded_alike: Agreement | None = None,
) -> Agreement:
    has_experts = model.num_moe_experts is not None
    tolerance = SAME_BITS + SAME_BITS_FRAC * gap.largest_logit
    latitude = SWITCHED_EXPERTS if has_experts else None
    if rounded_to is not None:
        tolerance, latitude = ROUNDED[rounded_to], ROUNDED_WEIGHTS
    is_beyond = ~(gap.differences <= tolerance)  # of what is not a number, too
    return Agreement(
        num_tokens=gap.differences.numel(),
        largest_logit_difference=float(gap.differences.max()),
        mean_logit_difference=gap.mean,
        same_next_token_frac=gap.same_next_token_frac,
        perplexity=gap.perplexity,
        perplexity_of_ours=gap.perplexity_of_ours,
        tolerance=tolerance,
        beyond_frac=float(is_beyond.double().mean()),
        latitude=latitude,
        has_experts=has_experts,
        rounded_alike=rounded_alike,
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


def published_model(hf_folder: Path, source: Source) -> nn.Module:
    """The Hugging Face model, in fp32.

    Its class is that of its architecture: a ``model_type`` of its own, as Kimi K2's beside
    ``DeepseekV3ForCausalLM``, need not be known. Raises ``CheckpointError``.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    named = [*(read_config(hf_folder).get("architectures") or ()), source.family().architecture]
    found: Any = next(getattr(transformers, name) for name in named if hasattr(transformers, name))
    try:
        config = found.config_class.from_pretrained(hf_folder, local_files_only=True)
        config.model_type = found.config_class.model_type  # by which it renames weights
        model: nn.Module = found.from_pretrained(
            hf_folder, config=config, local_files_only=True, dtype=torch.float32
        )
    except Exception as error:  # the library raises kinds of its own, and of what it calls
        raise CheckpointError(
            f"{hf_folder}: transformers {transformers.__version__} cannot load it as "
            f"{found.__name__} ({str(error).strip().splitlines()[0]}); --no-verify converts "
            "without comparing"
        ) from error
    return model.eval()


@contextmanager
def megatron_model(
    model: Model,
    *,
    num_rows: int,
    seq_length: int,
    fill: Callable[[nn.Module, Groups], None],
) -> Iterator[nn.Module]:
    """A model on one rank, in fp32, with a vocabulary of ``num_rows``, once it is filled."""
    from megatron_curr.models.gpt import build_gpt
    from megatron_curr.parallel.groups import build_groups, destroy_groups, one_rank

    unpadded = model.model_copy(update={"make_vocab_size_divisible_by": 1})
    parallel = Parallel(micro_batch_tokens=seq_length)
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
            fill(gpt, groups)
            yield gpt
        finally:
            destroy_groups()


def round_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Round what is saved of a model to ``dtype``; it stays fp32."""
    for weight in model.state_dict().values():
        if isinstance(weight, Tensor) and weight.is_floating_point():
            weight.copy_(weight.to(dtype))


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


def _published_dtype(hf_folder: Path) -> torch.dtype:
    """The dtype of most of the folder's values."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in open_published(hf_folder).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
