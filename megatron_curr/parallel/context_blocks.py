"""Softmax attention in blocks of the score matrix, and how blocks add up to the whole.

A block gives its output and the logarithm of its softmax sums; two blocks of the same queries merge
by these logarithms (online softmax: Milakov and Gimelshein 2018, arXiv:1805.02867; FlashAttention:
Dao et al. 2022, arXiv:2205.14135). Going back, a block needs the sums of the whole row only, so
blocks are independent. Sums over blocks are kept in fp32, or fp64 for fp64 inputs.

Plain and causal blocks go through torch's fused kernels; blocks with the edge of a document, and
inputs the kernels refuse, are written out in tiles, so no score matrix is ever whole. Tiles whose
queries and keys share no document are skipped.

Legend: B micro-batch, G key/value heads, X = B x G, R query heads of one key/value head, S queries,
T keys, H head dim of queries and keys, V head dim of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_curr.parallel.context_split import (
    count_before,
    local_positions,
    split_sequence,
)

TILE_LENGTH = 256


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of scores. ``is_causal``: square, a query sees keys up to its own place in it."""

    queries: slice
    keys: slice
    is_causal: bool
    crosses_documents: bool = False
    crosses_window: bool = False

    @property
    def is_masked(self) -> bool:
        """Whether some of its scores do not count, but for the causal mask."""
        return self.crosses_documents or self.crosses_window


@dataclass(frozen=True, slots=True, kw_only=True)
class Deal:
    """Which scores a rank computes: its queries against the keys of each source rank.

    ``document_ids_BS`` covers the whole sequence and is dealt as the sequence is. Of full attention
    only the first ``num_tokens`` keys of the whole sequence count; the rest is padding. Of causal
    attention with a ``window`` a query sees that many keys of the whole sequence's
    ``seq_length``, its own included.
    """

    rank: int
    size: int
    softmax_scale: float
    is_causal: bool
    document_ids_BS: Tensor | None
    num_tokens: int | None = None
    window: int | None = None
    seq_length: int | None = None

    def block(self, source: int, *, length: int) -> Block:
        """The scores of this rank's queries against one rank's keys, each ``length`` long.

        With chunks r and 2C - 1 - r on rank r, causal attention needs no mask but on the rank's own
        keys: of an earlier rank all queries see the first chunk and none the second, and of a later
        rank the second chunk of queries sees all. This is the "zigzag" deal of Megatron-LM and
        ring-flash-attention; striped attention (Brandon et al. 2023, arXiv:2311.09431) has the same
        aim.
        """
        whole, half = slice(0, length), length // 2
        if not self.is_causal:
            # Dealt in order, a rank's padding comes after all its tokens: no mask, fewer keys.
            num_tokens = length * self.size if self.num_tokens is None else self.num_tokens
            keys = count_before(
                num_tokens, seq_length=length * self.size, cp_rank=source, cp_size=self.size
            )
            return Block(whole, slice(0, keys), False)
        if source == self.rank:
            return Block(whole, whole, True)
        if source < self.rank:
            return Block(whole, slice(0, half), False)
        return Block(slice(half, length), whole, False)

    def ids_of(self, rank: int) -> Tensor | None:
        """Document ids of one rank's positions."""
        if self.document_ids_BS is None:
            return None
        return split_sequence(self.document_ids_BS, cp_rank=rank, cp_size=self.size, dim=1)


class Attended:
    """Output [X, R, S, V] and log of softmax sums [X, R, S] of the keys seen so far."""

    def __init__(self, q_XRSH: Tensor, value_dim: int) -> None:
        dtype = accumulation_dtype(q_XRSH.dtype)
        self.lse_XRS = q_XRSH.new_full(q_XRSH.shape[:3], -torch.inf, dtype=dtype)
        self._shape = (*q_XRSH.shape[:3], value_dim)
        self._out_XRSV: Tensor | None = None

    @property
    def out_XRSV(self) -> Tensor:
        """Zero for queries that have seen no key."""
        if self._out_XRSV is None:
            self._out_XRSV = self.lse_XRS.new_zeros(self._shape)
        return self._out_XRSV

    def add(self, queries: slice, out_XRSV: Tensor, lse_XRS: Tensor) -> None:
        """Merge what ``queries`` got from keys not seen before."""
        if self._out_XRSV is None and out_XRSV.shape == self._shape:
            self._out_XRSV, self.lse_XRS = out_XRSV.to(self.lse_XRS.dtype), lse_XRS
            return
        seen_XRSV, seen_XRS = self.out_XRSV[:, :, queries], self.lse_XRS[:, :, queries]
        both_XRS = torch.logaddexp(seen_XRS, lse_XRS)
        safe_XRS = both_XRS.masked_fill(both_XRS == -torch.inf, 0.0)  # -inf - -inf would be nan
        seen_XRSV.mul_((seen_XRS - safe_XRS).exp_()[..., None])
        seen_XRSV.add_(out_XRSV * (lse_XRS - safe_XRS).exp_()[..., None])
        seen_XRS.copy_(both_XRS)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def attend(
    q_XRSH: Tensor, key_value: tuple[Tensor, Tensor], into: Attended, *, deal: Deal, source: int
) -> None:
    """Add to ``into`` what this rank's queries get from one rank's keys [X, T, H] and values."""
    k_XTH, v_XTV = key_value
    scale = deal.softmax_scale
    for block in _blocks(q_XRSH, v_XTV, deal=deal, source=source):
        q, k, v = q_XRSH[:, :, block.queries], k_XTH[:, block.keys], v_XTV[:, block.keys]
        if _is_fusible(q, v) and not block.is_masked:
            out, lse = _fused(q, k, v, is_causal=block.is_causal, scale=scale)
        else:
            hidden = _hidden(block, q, deal, source)
            out, lse = _written_out(q, k, v, scale=scale, hidden=hidden)
        into.add(block.queries, out, lse)


def attend_backward(
    q_XRSH: Tensor,
    key_value: tuple[Tensor, Tensor],
    *,
    attended: tuple[Tensor, Tensor, Tensor],
    dq_XRSH: Tensor,
    room: Callable[[], tuple[Tensor, Tensor]],
    deal: Deal,
    source: int,
) -> None:
    """Add the gradients of ``attend``'s scores: of queries to ``dq_XRSH``, of the rest to ``room``.

    ``attended`` holds the gradient of the output, the output and the log sums over ALL keys.
    ``room`` gives the sums of the gradients of keys and values; it may have to wait for them, so it
    is asked after the work.
    """
    k_XTH, v_XTV = key_value
    scale = deal.softmax_scale
    for block in _blocks(q_XRSH, v_XTV, deal=deal, source=source):
        q, k, v = q_XRSH[:, :, block.queries], k_XTH[:, block.keys], v_XTV[:, block.keys]
        dout, out, lse = (x[:, :, block.queries] for x in attended)
        if _is_fusible(q, v) and not block.is_masked:
            dq, dk, dv = _fused_backward(
                q, k, v, dout=dout, out=out, lse=lse, is_causal=block.is_causal, scale=scale
            )
        else:
            hidden = _hidden(block, q, deal, source)
            dq, dk, dv = _written_out_backward(
                q, k, v, dout=dout, out=out, lse=lse, scale=scale, hidden=hidden
            )
        dq_XRSH[:, :, block.queries].add_(dq)
        del dq
        for sums, part in zip(room(), (dk, dv), strict=True):
            sums[:, block.keys].add_(part)


def _blocks(q_XRSH: Tensor, v_XTV: Tensor, *, deal: Deal, source: int) -> Iterator[Block]:
    """The deal's block, or its tiles where documents or the kernels ask for them."""
    block = deal.block(source, length=q_XRSH.shape[2])
    if block.keys.stop == 0:
        return
    is_fusible = _is_fusible(q_XRSH, v_XTV)
    ids, key_ids = deal.ids_of(deal.rank), deal.ids_of(source)
    if ids is None or key_ids is None:
        if is_fusible and deal.window is None:
            yield block
            return
        ids = key_ids = torch.zeros((1, q_XRSH.shape[2]), dtype=torch.int64)
    runs = _tiles(block, ids[:, block.queries], key_ids[:, block.keys], deal=deal, source=source)
    yield from _joined(runs) if is_fusible else runs


def _tiles(
    block: Block, ids_BS: Tensor, ids_BT: Tensor, *, deal: Deal, source: int
) -> Iterator[Block]:
    """Tiles with a score in them, by rows. Ids may come in any order: bounds decide, cautiously."""
    (low, high), (key_low, key_high) = _bounds(ids_BS), _bounds(ids_BT)
    apart = ((low[:, None] > key_high) | (key_low > high[:, None])).all(-1)
    alike = ((low == high)[:, None] & (key_low == key_high) & (low[:, None] == key_low)).all(-1)
    visible = (~apart).tril() if block.is_causal else ~apart
    crossed = torch.zeros_like(visible)
    if deal.window is not None:
        places_S, places_T = _places(block, deal, source)
        (first, last), (key_first, key_last) = _bounds(places_S[None]), _bounds(places_T[None])
        visible &= first - key_last.T < deal.window
        crossed = last - key_first.T >= deal.window
    alike, crossed = alike.tolist(), crossed.tolist()
    for row, column in visible.nonzero().tolist():
        yield Block(
            _tile(row, block.queries),
            _tile(column, block.keys),
            is_causal=block.is_causal and row == column,
            crosses_documents=not alike[row][column],
            crosses_window=crossed[row][column],
        )


def _places(block: Block, deal: Deal, source: int) -> tuple[Tensor, Tensor]:
    """Where in the whole sequence the block's queries and its keys are."""
    assert deal.seq_length is not None
    queries, keys = (
        local_positions(deal.seq_length, cp_rank=rank, cp_size=deal.size)
        for rank in (deal.rank, source)
    )
    return queries[block.queries], keys[block.keys]


def _tile(index: int, within: slice) -> slice:
    start = within.start + index * TILE_LENGTH
    return slice(start, min(start + TILE_LENGTH, within.stop))


def _bounds(ids_BS: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest id of every tile, each [tiles, B]."""
    bounds = [torch.stack(tile.aminmax(dim=1)) for tile in ids_BS.split(TILE_LENGTH, dim=1)]
    low, high = torch.stack(bounds, dim=1)
    return low, high


def _joined(tiles: Iterator[Block]) -> Iterator[Block]:
    """Neighbours along the keys as one block where neither has a mask."""
    run: Block | None = None
    for tile in tiles:
        is_plain = not (tile.is_causal or tile.is_masked)
        if run and is_plain and run.queries == tile.queries and run.keys.stop == tile.keys.start:
            run = replace(run, keys=slice(run.keys.start, tile.keys.stop))
            continue
        if run:
            yield run
        run = tile if is_plain else None
        if not is_plain:
            yield tile
    if run:
        yield run


def _hidden(block: Block, q_XRSH: Tensor, deal: Deal, source: int) -> Tensor | None:
    """True where a score does not count, [X or 1, 1, S, T] of the block; None if all count."""
    num_queries = block.queries.stop - block.queries.start
    num_keys = block.keys.stop - block.keys.start
    hidden = None
    if block.is_causal:
        ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_XRSH.device)
        hidden = ones.triu_(1)[None, None]
    if block.crosses_documents:
        ids, key_ids = deal.ids_of(deal.rank), deal.ids_of(source)
        assert ids is not None and key_ids is not None
        other_BST = ids[:, block.queries, None] != key_ids[:, None, block.keys]
        num_groups = q_XRSH.shape[0] // other_BST.shape[0]
        other = other_BST.to(q_XRSH.device).repeat_interleave(num_groups, dim=0)[:, None]
        hidden = other if hidden is None else hidden | other
    if block.crosses_window:
        places_S, places_T = _places(block, deal, source)
        beyond = (places_S[:, None] - places_T >= deal.window).to(q_XRSH.device)[None, None]
        hidden = beyond if hidden is None else hidden | beyond
    return hidden


def _is_fusible(q_XRSH: Tensor, v_XTV: Tensor) -> bool:
    """A kernel of torch takes these inputs and gives the log sums."""
    head_dim = q_XRSH.shape[-1]
    if head_dim != v_XTV.shape[-1]:
        return False
    if q_XRSH.is_cuda:
        is_half = q_XRSH.dtype in (torch.float16, torch.bfloat16)
        return is_half and head_dim <= 256 and head_dim % 8 == 0
    return q_XRSH.device.type == "cpu"


def _fused(
    q_XRSH: Tensor, k_XTH: Tensor, v_XTH: Tensor, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    k, v = _for_every_head(k_XTH, q_XRSH), _for_every_head(v_XTH, q_XRSH)
    if q_XRSH.is_cuda:
        found = torch.ops.aten._scaled_dot_product_flash_attention(
            q_XRSH, k, v, 0.0, is_causal, False, scale=scale
        )
        return found[0], found[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_XRSH, k, v, 0.0, is_causal, scale=scale
    )


def _fused_backward(
    q_XRSH: Tensor,
    k_XTH: Tensor,
    v_XTH: Tensor,
    *,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _for_every_head(k_XTH, q_XRSH), _for_every_head(v_XTH, q_XRSH)
    lse = lse.contiguous()  # the kernels read its rows one after the other
    if q_XRSH.is_cuda:
        unused = torch.zeros(2, dtype=torch.uint64, device=q_XRSH.device)  # state of dropout
        lengths = (None, None, q_XRSH.shape[2], k.shape[2])
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q_XRSH, k, v, out, lse, *lengths, 0.0, is_causal, unused, unused, scale=scale
        )
    else:
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q_XRSH, k, v, out, lse, 0.0, is_causal, scale=scale
        )
    if dk.shape[1] == 1:
        return dq, dk.squeeze(1), dv.squeeze(1)
    dtype = accumulation_dtype(q_XRSH.dtype)
    dk = dk.sum(1, dtype=dtype)  # one after the other: each frees what it was made from
    return dq, dk, dv.sum(1, dtype=dtype)


def _for_every_head(k_XTH: Tensor, q_XRSH: Tensor) -> Tensor:
    """[X, R, T, H] without a copy."""
    return k_XTH[:, None].expand(-1, q_XRSH.shape[1], -1, -1)


def _scores(q_XRSH: Tensor, k_XTH: Tensor, *, scale: float, hidden: Tensor | None) -> Tensor:
    """[X, R, S, T], of accumulation dtype like its inputs."""
    flat = q_XRSH.flatten(1, 2) @ k_XTH.mT
    scores_XRST = flat.mul_(scale).view(*q_XRSH.shape[:3], -1)
    return scores_XRST if hidden is None else scores_XRST.masked_fill_(hidden, -torch.inf)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    q_XRSH, k_XTH, v_XTV = (x.to(accumulation_dtype(x.dtype)) for x in (q, k, v))
    scores_XRST = _scores(q_XRSH, k_XTH, scale=scale, hidden=hidden)
    top_XRS1 = scores_XRST.amax(-1, keepdim=True)
    top_XRS1.masked_fill_(top_XRS1 == -torch.inf, 0.0)
    weights_XRST = scores_XRST.sub_(top_XRS1).exp_()
    sums_XRS1 = weights_XRST.sum(-1, keepdim=True)
    out_XRSV = (weights_XRST.flatten(1, 2) @ v_XTV).view(*q_XRSH.shape[:3], -1)
    # A query that sees none of these keys has sum 0: output 0, log -inf.
    out_XRSV /= sums_XRS1.masked_fill(sums_XRS1 == 0.0, 1.0)
    return out_XRSV, (top_XRS1 + sums_XRS1.log()).squeeze(-1)


def _written_out_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(q.dtype)
    q_XRSH, k_XTH, v_XTV, dout_XRSV = (x.to(dtype) for x in (q, k, v, dout))
    weights_XRST = _scores(q_XRSH, k_XTH, scale=scale, hidden=hidden).sub_(lse[..., None]).exp_()
    flat_dout = dout_XRSV.flatten(1, 2)
    dv_XTV = weights_XRST.flatten(1, 2).mT @ flat_dout
    dscores_XRST = (flat_dout @ v_XTV.mT).view_as(weights_XRST)
    dscores_XRST -= (dout_XRSV * out).sum(-1, keepdim=True)
    dscores_XRST.mul_(weights_XRST).mul_(scale)
    flat_dscores = dscores_XRST.flatten(1, 2)
    dk_XTH = flat_dscores.mT @ q_XRSH.flatten(1, 2)
    dq_XRSH = (flat_dscores @ k_XTH).view_as(q_XRSH)
    return dq_XRSH, dk_XTH, dv_XTV
