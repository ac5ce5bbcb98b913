"""What every conversion reads from: weights under their full names, rows when asked for."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


def written_dtype(weights: Weights, name: str, dtype: torch.dtype | None) -> torch.dtype:
    """The dtype a weight is written in. Router biases stay as they are: they need fp32."""
    stored = weights.dtype(name)
    return stored if dtype is None or name.endswith("expert_bias") else dtype


class Weights(Protocol):
    """A checkpoint, a Hugging Face folder seen through a table, or arithmetic on several."""

    def __contains__(self, name: str) -> bool:
        """Whether there is such a weight."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one weight."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of one weight."""
        ...

    def read(self, name: str, start: int = 0, end: int | None = None) -> Tensor:
        """Rows [start, end): not to be written to, for they may be a view of a file."""
        ...
