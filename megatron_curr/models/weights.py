"""First weights that do not depend on the layout.

Every number is a pure function of (seed, parameter's name in the whole model, its row and column in
the full tensor): a Philox counter stream per block of rows, turned into normals by Box-Muller. So
TP 4 x PP 2 x EP 2 starts from the weights one rank would start from, and rows that only pad the
vocabulary do not disturb the rest. About 30 ns a weight of the full rows a rank touches; never more
than one block (8 MiB) beside the parameter itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from megatron_curr.parallel.full_tensors import Axis, Cut, axis_of, cut_of, named_full_parameters
from megatron_curr.parallel.groups import Groups

_BLOCK_WEIGHTS = 1 << 20
_PROJECTIONS_INTO_RESIDUAL = (".linear_proj.weight", ".linear_fc2.weight")


@torch.no_grad()
def initialise_weights(
    chunk: nn.Module,
    *,
    groups: Groups,
    seed: int,
    spread: Callable[[str, Tensor], float | None],
    gain: float = 1.0,
) -> None:
    """Fill one pipeline chunk in place.

    ``spread`` gives the standard deviation of a parameter, by its name in the whole model: normals,
    or where it is None ``gain``, and zeros for biases.
    """
    for name, parameter in named_full_parameters(chunk):
        std = spread(name, parameter)
        if std is not None:
            _fill_normal(
                parameter.view(parameter.shape[0] if parameter.dim() > 1 else 1, -1),
                cut=cut_of(parameter),
                axis=axis_of(name, groups),
                key=_key(seed, name),
                std=std,
            )
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.fill_(gain)


def matrix_spread(name: str, parameter: Tensor, *, std: float, num_layers: int) -> float | None:
    """``std`` for matrices, nothing for biases and norms.

    Matrices that write into the residual stream are narrower by sqrt(2 num_layers), as GPT-2's and
    Megatron's are.
    """
    if parameter.dim() == 1 or name.endswith("bias"):
        return None
    return std / math.sqrt(2 * num_layers) if name.endswith(_PROJECTIONS_INTO_RESIDUAL) else std


def _key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=16).digest())


def _fill_normal(parameter: Tensor, *, cut: Cut, axis: Axis, key: int, std: float) -> None:
    """Write this rank's part of the full [rows, columns] matrix, a block of full rows at a time."""
    size = axis.size if cut.dim is not None else 1
    rank = axis.rank if cut.dim is not None else 0
    num_rows, num_columns = cut.full_shape(parameter.shape, size)
    rows_per_block = max(_BLOCK_WEIGHTS // num_columns, 1)
    for first_row, mine, full_rows in _row_ranges(cut, rank=rank, size=size, num_rows=num_rows):
        for block in range(first_row // rows_per_block, -(-full_rows // rows_per_block)):
            block_start = block * rows_per_block
            start = max(first_row, block_start)
            end = min(full_rows, block_start + rows_per_block)
            # Of the block's stream, as far as it is needed.
            normals = _normals(key, block, shape=(end - block_start, num_columns))
            rows = torch.from_numpy(normals[start - block_start : end - block_start]) * std
            if cut.dim == 1:
                rows = cut.part(rows, rank=rank, size=size)
            target = mine + start - first_row
            parameter[target : target + end - start].copy_(rows)


def _row_ranges(cut: Cut, *, rank: int, size: int, num_rows: int) -> list[tuple[int, int, int]]:
    """(first full row, first local row, end of the full rows) of each run of rows held here."""
    if cut.dim != 0:
        return [(0, 0, num_rows)]
    stack_rows = num_rows // cut.stride
    part_rows = stack_rows // size
    return [
        (
            stack * stack_rows + rank * part_rows,
            stack * part_rows,
            stack * stack_rows + (rank + 1) * part_rows,
        )
        for stack in range(cut.stride)
    ]


def _normals(key: int, block: int, *, shape: tuple[int, int]) -> np.ndarray:
    """Standard normals [rows, columns], float32, of one block of rows."""
    raw = np.random.Philox(key=key, counter=block << 128).random_raw(math.prod(shape))
    radius = np.sqrt(-2.0 * np.log(((raw >> 32) + 0.5) * 2.0**-32))
    angle = (raw & 0xFFFFFFFF) * (2.0 * math.pi * 2.0**-32)
    return (radius * np.cos(angle)).astype(np.float32).reshape(shape)
