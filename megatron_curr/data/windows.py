"""From samples to arrays: tokens, labels, loss mask and document ids. numpy only.

Legend: B rows of a batch, S tokens of a row.

A row reads S + 1 tokens of its source's stream: the first S are inputs, the last S are labels. With
documents isolated, attention does not leave a document, and the one label that leads from a
document's EOD to the next document's first token is masked: nothing in its context could predict
it. Positions need no reset: rotary embeddings see only differences of positions, which within a
document are the same wherever it starts.

Tokens that preprocessing set before a document (its metadata, a control token) are read but not
learned: no label that is one of them counts, in whatever window it falls. Where no shard of a
source has any, that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.order import Samples
from megatron_curr.data.shards import ShardSet
from megatron_curr.errors import DataError

Ints = NDArray[np.int64]

NUM_PROBES, PROBE_TOKENS = 64, 1024


@dataclass(frozen=True, slots=True)
class Row:
    """Where one row is read: ``num_labels`` + 1 tokens from ``first_token`` on; padding has 0."""

    shard_set: ShardSet
    first_token: int
    num_labels: int


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows of one length. ``loss_mask_BS`` is 1 where a label counts.

    Tokens and labels are two views of one array.
    """

    tokens_BS: Ints
    labels_BS: Ints
    loss_mask_BS: NDArray[np.float32]
    document_ids_BS: Ints | None  # from 0 in each row; None where documents are not isolated


def cut_windows(
    shard_sets: Sequence[ShardSet],
    samples: Samples,
    *,
    isolate_documents: bool = False,
    vocab_size: int | None = None,
) -> Windows:
    """The windows of some samples of one sequence length; ``shard_sets`` as the order numbers them.

    Raises ``DataError`` for a token id outside the vocabulary.
    """
    seq_length = int(samples.seq_length[0])
    assert (samples.seq_length == seq_length).all()
    rows = [
        Row(shard_sets[source], first_token, seq_length)
        for source, first_token in zip(
            samples.source.tolist(), samples.first_token.tolist(), strict=True
        )
    ]
    return cut_rows(rows, seq_length, isolate_documents=isolate_documents, vocab_size=vocab_size)


def cut_rows(
    rows: Sequence[Row],
    seq_length: int,
    *,
    isolate_documents: bool = False,
    vocab_size: int | None = None,
) -> Windows:
    """Rows as arrays; what a row lacks to ``seq_length`` labels is zeros that do not count."""
    width = seq_length + 1
    stream = np.empty((len(rows), width), np.int64)
    for number, row in enumerate(rows):
        count = row.num_labels + 1 if row.num_labels else 0
        stream[number, :count] = row.shard_set.read(row.first_token, count) if count else 0
        stream[number, count:] = 0
    if vocab_size is not None:
        _check_ids(stream, rows, vocab_size)
    loss_mask_BS = np.ones((len(rows), seq_length), np.float32)
    for number, row in enumerate(rows):
        loss_mask_BS[number, row.num_labels :] = 0.0
        if row.shard_set.has_masked and row.num_labels:
            for begin, end in row.shard_set.masked_spans(row.first_token + 1, row.num_labels):
                loss_mask_BS[number, begin:end] = 0.0
    document_ids_BS = None
    if isolate_documents:
        starts = _document_starts(rows, width)
        loss_mask_BS[starts[:, 1:]] = 0.0
        starts[:, 0] = True
        document_ids_BS = np.cumsum(starts[:, :-1], axis=1) - 1
    return Windows(
        tokens_BS=stream[:, :-1],
        labels_BS=stream[:, 1:],
        loss_mask_BS=loss_mask_BS,
        document_ids_BS=document_ids_BS,
    )


def probe_vocabulary(shard_set: ShardSet, vocab_size: int) -> None:
    """Read windows spread over a stream whose largest id no manifest tells.

    Raises ``DataError`` for a token id outside the vocabulary.
    """
    length = min(PROBE_TOKENS, shard_set.num_tokens) - 1
    firsts = np.linspace(0, shard_set.num_tokens - length - 1, NUM_PROBES, dtype=np.int64)
    rows = [Row(shard_set, first, length) for first in firsts.tolist()]
    cut_rows(rows, length, vocab_size=vocab_size)


def _document_starts(rows: Sequence[Row], width: int) -> NDArray[np.bool_]:
    """[B, width]: where a document begins."""
    starts = np.zeros((len(rows), width), np.bool_)
    for number, row in enumerate(rows):
        if row.num_labels:
            begins = row.shard_set.document_starts(row.first_token, row.num_labels + 1)
            starts[number, begins] = True
    return starts


def _check_ids(stream: Ints, rows: Sequence[Row], vocab_size: int) -> None:
    if not len(rows) or (int(stream.max()) < vocab_size and int(stream.min()) >= 0):
        return
    number, column = np.argwhere((stream >= vocab_size) | (stream < 0))[0].tolist()
    row = rows[number]
    path, token = row.shard_set.place_of(row.first_token + column)
    raise DataError(
        f"{path}: token {token:,} has id {stream[number, column]}, but the vocabulary has "
        f"{vocab_size:,} ids (0 to {vocab_size - 1}): the shard was made with another tokenizer, "
        "or is damaged; set data.tokenizer to the one that made it or preprocess again"
    )
