"""What a model learns: from a micro-batch to a loss, as sums that ranks and micro-batches add up.

A loss function gives (sum to differentiate, count, [2, num_groups] sums and counts to report);
megatron-core divides gradients by the count of the whole global batch, so neither the layout nor
the micro-batch enters the result.

Legend: B samples of a micro-batch, S places of the sequence on this context rank, T latent frames,
Y rows, X columns, K numbers of a patch, P latent positions of a patch, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_curr.data.loader import Batch
from megatron_curr.data.video_loader import VideoBatch
from megatron_curr.models.patches import local_patches
from megatron_curr.parallel.context_split import split_for_context_parallel
from megatron_curr.parallel.groups import Groups

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


class Objective(Protocol):
    """One kind of training."""

    def forward(
        self, chunk: torch.nn.Module, batch: Any, *, num_groups: int
    ) -> tuple[Tensor, LossFunction]:
        """The chunk's output, and what makes a loss of the last one's."""

    def shape(self, batch: Any) -> tuple[int, int]:
        """[B, S] of the whole sequence, for stages that receive hidden states."""


class NextToken:
    """Cross-entropy of text; counts are tokens that carry loss, groups are sources."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    def forward(
        self, chunk: torch.nn.Module, batch: Batch, *, num_groups: int
    ) -> tuple[Tensor, LossFunction]:
        """See ``Objective``."""
        device, groups = self._groups.device, self._groups
        mask_BS = split_for_context_parallel(batch.loss_mask_BS, groups).to(device)
        output = chunk(
            split_for_context_parallel(batch.tokens_BS, groups).to(device),
            None,  # RoPE counts for itself
            None if batch.document_ids_BS is None else batch.document_ids_BS.to(device),
            labels=split_for_context_parallel(batch.labels_BS, groups).to(device),
        )
        return output, partial(
            token_loss_sums,
            mask_BS=mask_BS,
            source_B=batch.source_index_B.to(device),
            num_sources=num_groups,
        )

    def shape(self, batch: Batch) -> tuple[int, int]:
        """See ``Objective``."""
        rows, length = batch.tokens_BS.shape
        return rows, length


class RectifiedFlow:
    """Squared error of the velocity; counts are samples, groups are what the batch says.

    A sample's loss is the mean over its noised frames, and the report leaves its weight out.
    """

    def __init__(self, groups: Groups, *, patch: Sequence[int]) -> None:
        self._groups = groups
        self._patch = tuple(patch)

    def forward(
        self, chunk: torch.nn.Module, batch: VideoBatch, *, num_groups: int
    ) -> tuple[Tensor, LossFunction]:
        """See ``Objective``. Every rank of a model is given the whole micro-batch."""
        device = self._groups.device
        output = chunk(
            batch.latents_BCTYX.to(device),
            batch.text_BLE.to(device),
            batch.text_lengths_B.to(device),
            batch.timesteps_B.to(device),
            batch.fps_B.to(device),
            batch.frame_mask_BT.to(device),
        )
        return output, partial(self._loss_sums, batch=batch, num_groups=num_groups)

    def shape(self, batch: VideoBatch) -> tuple[int, int]:
        """See ``Objective``; stages tell each other the real length of each micro-batch."""
        samples, _, frames, rows, columns = batch.latents_BCTYX.shape
        return samples, frames * rows * columns

    def _loss_sums(
        self, velocity_BSK: Tensor, *, batch: VideoBatch, num_groups: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, device = self._groups, velocity_BSK.device
        target_BCTYX = batch.target_BCTYX.to(device)
        num_channels = target_BCTYX.shape[1]
        mask_B1T11 = batch.frame_mask_BT[:, None, :, None, None].to(device, torch.float32)
        mask_B1TYX = mask_B1T11.expand(-1, -1, -1, *target_BCTYX.shape[3:])
        # This context rank's places; none of a patch's numbers beyond the border is counted.
        target_BSK = local_patches(target_BCTYX, patch=self._patch, groups=groups)
        mask_BSP = local_patches(mask_B1TYX, patch=self._patch, groups=groups)
        num_positions = mask_BSP.shape[2]
        ours = velocity_BSK.float().unflatten(2, (num_positions, -1))[..., :num_channels]
        error_BSP = (ours - target_BSK.unflatten(2, (num_positions, -1))).square().sum(dim=-1)
        noised_B = mask_B1TYX.sum(dim=(1, 2, 3, 4)) * num_channels
        mean_B = (error_BSP * mask_BSP).sum(dim=(1, 2)) / noised_B * batch.counted_B.to(device)
        # Context ranks hold parts of the same samples, which one of them counts.
        counted_B = batch.counted_B.to(device) * float(groups.cp_rank == 0)
        group_B = batch.group_B.to(device)
        by_group = torch.zeros(2, num_groups, dtype=torch.float64, device=device)
        by_group[0].index_add_(0, group_B, mean_B.detach().double())
        by_group[1].index_add_(0, group_B, counted_B.double())
        loss = (mean_B * batch.loss_weight_B.to(device)).sum()
        return loss, counted_B.sum().to(torch.int), by_group


def token_loss_sums(
    loss_BS: Tensor, *, mask_BS: Tensor, source_B: Tensor, num_sources: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum to differentiate, number of tokens, [2, num_sources] sums and tokens by source)."""
    mask_BS = mask_BS.to(torch.float32)
    masked_BS = loss_BS.float() * mask_BS
    by_source = torch.zeros(2, num_sources, dtype=torch.float64, device=loss_BS.device)
    by_source[0].index_add_(0, source_B, masked_BS.detach().sum(dim=1, dtype=torch.float64))
    by_source[1].index_add_(0, source_B, mask_BS.sum(dim=1, dtype=torch.float64))
    return masked_BS.sum(), mask_BS.sum().to(torch.int), by_source
