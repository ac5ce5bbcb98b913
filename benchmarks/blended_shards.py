"""Two sources of 100 and 1,000 shards, and megatron-core's own way to blend them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_curr.data.idx_format import bin_path, header_bytes, idx_path

SEQ_LENGTH = 2048
SHARDS = {"few": 100, "many": 1000}
SHARD_TOKENS = 50_000
DOCUMENT_TOKENS = 1_000
HUGE_SHARDS = 5_000
HUGE_SHARD_TOKENS = 3 * 10**9


def write_shard(prefix: Path, lengths: list[int], tokens: np.ndarray | None) -> None:
    """One .bin/.idx pair; without ``tokens`` the .bin is a hole of the right size."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    with open(idx_path(prefix), "wb") as stream:
        stream.write(header_bytes(np.dtype(np.uint16), len(lengths), len(lengths)))
        stream.write(np.array(lengths, np.int32).tobytes())
        stream.write((starts[:-1] * 2).astype(np.int64).tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
    with open(bin_path(prefix), "wb") as stream:
        if tokens is None:
            stream.truncate(int(starts[-1]) * 2)
        else:
            stream.write(tokens.tobytes())


def write_corpora(root: Path) -> None:
    """Two sources of real tokens, and 15T tokens of holes in 5,000 shards."""
    rng = np.random.default_rng(0)
    lengths = [DOCUMENT_TOKENS] * (SHARD_TOKENS // DOCUMENT_TOKENS)
    for source, num_shards in SHARDS.items():
        (root / source).mkdir()
        for number in range(num_shards):
            tokens = rng.integers(0, 50_000, SHARD_TOKENS, dtype=np.uint16)
            write_shard(root / source / f"{number:04d}", lengths, tokens)
    (root / "huge").mkdir()
    half = HUGE_SHARD_TOKENS // 2
    for number in range(HUGE_SHARDS):
        write_shard(root / "huge" / f"{number:04d}", [half, HUGE_SHARD_TOKENS - half], None)


def core_blend(root: Path, weights: dict[str, float], num_samples: int) -> Any:
    """A BlendedDataset of one GPTDataset a shard: Megatron's way to mix sources of many files."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Vocabulary:
        """What GPTDataset asks of a tokenizer."""

        vocab_size, eod, pad, unique_identifiers = 50_000, 0, -1, {"class": "benchmark"}

    prefixes = [p for s in SHARDS for p in sorted((root / s).glob("*.idx"))]
    shares = [weights[p.parent.name] / SHARDS[p.parent.name] for p in prefixes]
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQ_LENGTH,
        blend_per_split=[([str(p.with_suffix("")) for p in prefixes], shares), None, None],
        tokenizer=Vocabulary(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        mid_level_dataset_surplus=0.5,
    )
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, [num_samples, None, None], lambda: True, config
    )
    return builder.build()[0]


def core_pieces(dataset: Any, number: int) -> list[tuple[int, int, int, int]]:
    """(shard, document, first token, end) that one sample of a BlendedDataset reads as inputs."""
    shard = int(dataset.dataset_index[number])
    part = dataset.datasets[shard]
    row = part.shuffle_index[dataset.dataset_sample_index[number]]
    (first, first_offset), (last, last_offset) = part.sample_index[row], part.sample_index[row + 1]
    pieces = []
    for index in range(first, last + 1):
        start = first_offset if index == first else 0
        end = last_offset if index == last else DOCUMENT_TOKENS
        pieces.append((shard, int(part.document_index[index]), int(start), int(end)))
    return pieces


def core_replayed(
    root: Path,
    old_weights: dict[str, float],
    new_weights: dict[str, float],
    before: int,
    after: int,
) -> int:
    """Tokens read again after the weights change and the run goes on at the same sample."""
    old = core_blend(root, old_weights, before)
    new = core_blend(root, new_weights, before + after)
    num_documents = SHARD_TOKENS // DOCUMENT_TOKENS
    seen = np.zeros((sum(SHARDS.values()), num_documents, DOCUMENT_TOKENS), bool)
    for number in range(before):
        for shard, document, start, end in core_pieces(old, number):
            seen[shard, document, start:end] = True
    return sum(
        int(seen[shard, document, start:end].sum())
        for number in range(before, before + after)
        for shard, document, start, end in core_pieces(new, number)
    )
