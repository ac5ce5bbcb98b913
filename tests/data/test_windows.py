"""Windows: shifted labels, isolation of documents, and ids outside the vocabulary."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_curr.data.order import Samples
from megatron_curr.data.shards import open_shards
from megatron_curr.data.windows import Row, cut_rows, cut_windows
from megatron_curr.errors import DataError
from tests.data.corpora import write_shard

EOD = 0


# A document and how many tokens at its start carry no loss; a shard, perhaps without any such.
text_and_masked = st.tuples(st.lists(st.integers(1, 90), max_size=9), st.integers(0, 10))
texts_and_masked = st.lists(text_and_masked, min_size=1, max_size=8)
plain_texts = texts_and_masked.map(lambda corpus: [(text, 0) for text, _ in corpus])


def one_by_one(
    starts: set[int], masked: set[int], first: int, length: int
) -> dict[str, list[float]]:
    """A row token by token as the definition says, with its documents isolated or not."""
    row: dict[str, list[float]] = {"plain": [], "isolated": [], "document": []}
    document = 0
    for token in range(first, first + length):
        document += token > first and token in starts
        row["plain"].append(float(token + 1 not in masked))
        row["isolated"].append(float(token + 1 not in masked | starts))
        row["document"].append(document)
    return row


@given(st.lists(texts_and_masked | plain_texts, min_size=1, max_size=3), st.data())
@settings(max_examples=60)
def test_windows_equal_the_definition(corpora, data) -> None:
    with TemporaryDirectory() as folder:
        stream: list[int] = []
        starts: set[int] = set()
        masked: set[int] = set()
        for number, corpus in enumerate(corpora):
            documents = [[*text, EOD] for text, _ in corpus]
            counts = [min(count, len(text) + 1) for text, count in corpus]
            write_shard(Path(folder) / f"s{number}", documents, masked=counts)
            assert (Path(folder) / f"s{number}.masked").exists() == any(counts)
            for document, count in zip(documents, counts, strict=True):
                starts.add(len(stream))
                masked.update(range(len(stream), len(stream) + count))
                stream += document
        length = data.draw(st.integers(1, max(len(stream) - 1, 1)))
        if len(stream) <= length:
            return
        firsts = data.draw(
            st.lists(st.integers(0, len(stream) - length - 1), min_size=1, max_size=4)
        )
        shards = open_shards(folder)
        rows = [Row(shards, first, length) for first in firsts]
        windows = cut_rows(rows, length, isolate_documents=True)
        plain = cut_rows(rows, length)
    assert windows.document_ids_BS is not None and plain.document_ids_BS is None
    for number, first in enumerate(firsts):
        expected = one_by_one(starts, masked, first, length)
        assert windows.tokens_BS[number].tolist() == stream[first : first + length]
        assert windows.labels_BS[number].tolist() == stream[first + 1 : first + length + 1]
        assert windows.loss_mask_BS[number].tolist() == expected["isolated"]
        assert plain.loss_mask_BS[number].tolist() == expected["plain"]
        assert windows.document_ids_BS[number].tolist() == expected["document"]
        # No label leads from one document into the next.
        for left, right in pairwise(range(length)):
            if expected["document"][left] != expected["document"][right]:
                assert windows.loss_mask_BS[number, left] == 0


def test_samples_of_two_sources_become_one_batch(tmp_path: Path) -> None:
    low = open_shards(write_shard(tmp_path / "low", [list(range(20))]))
    high = open_shards(write_shard(tmp_path / "high", [list(range(100, 120))]))
    columns = (np.array(values) for values in ([0, 1], [1, 0], [0, 0], [3, 5], [4, 4]))
    windows = cut_windows([low, high], Samples(*columns))
    assert windows.tokens_BS.tolist() == [[103, 104, 105, 106], [5, 6, 7, 8]]
    assert windows.labels_BS.tolist() == [[104, 105, 106, 107], [6, 7, 8, 9]]


def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", [[1, 2, 3]], np.int32)
    write_shard(tmp_path / "b", [[4, 99, 5, -1]], np.int32)
    shards = open_shards(tmp_path)
    cut_rows([Row(shards, 0, 4)], 4, vocab_size=100)
    with pytest.raises(DataError, match=r"b\.bin: token 1 has id 99, but the vocabulary has 50"):
        cut_rows([Row(shards, 0, 2), Row(shards, 2, 2)], 2, vocab_size=50)
    with pytest.raises(DataError, match=r"b\.bin: token 3 has id -1"):
        cut_rows([Row(shards, 5, 1)], 1, vocab_size=100)


def test_a_padding_row_counts_for_nothing(tmp_path: Path) -> None:
    shards = open_shards(write_shard(tmp_path / "a", [[5, 6, 7, 8]]))
    rows = [Row(shards, 0, 2), Row(shards, 0, 0)]
    windows = cut_rows(rows, 3, isolate_documents=True, vocab_size=9)
    assert windows.tokens_BS.tolist() == [[5, 6, 7], [0, 0, 0]]
    assert windows.loss_mask_BS.tolist() == [[1, 1, 0], [0, 0, 0]]
