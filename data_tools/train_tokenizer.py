"""Train a SentencePiece tokenizer in the manner of Llama's, from jsonl documents.

BPE with byte fallback and single digits; text goes through unchanged (no normalisation, every space
and newline kept), so decoding gives the text back. The one exception is SentencePiece's own space
mark, U+2581: typed in a text it comes back as a space. Ids 0 to 2 are ``<unk>``, ``<s>`` and
``</s>``, which is the EOD; 3 to 258 are the bytes.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from data_tools.corpus import Document, find_files, read_documents
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError

DEFAULT_VOCAB_SIZE = 8_192
DEFAULT_SAMPLE_BYTES = 6_000_000
NUM_RESERVED = 259  # three control tokens and the 256 bytes
_MAX_LINE_BYTES = 4_192  # SentencePiece skips longer "sentences" with no more than a warning


def train_tokenizer(
    inputs: Sequence[Path],
    output: Path,
    *,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    seed: int = 1234,
) -> Tokenizer:
    """Train on a seeded sample, the same number of bytes of each file, and write ``output``.

    The same inputs, options and seed give the same file. Raises ``DataError`` when there is too
    little text for the vocabulary.
    """
    import sentencepiece

    if vocab_size <= NUM_RESERVED:
        raise DataError(
            f"vocab_size {vocab_size}: the control tokens and bytes take {NUM_RESERVED}"
        )
    files = find_files(inputs)
    samples = (
        _sample(read_documents(path), sample_bytes // len(files), seed=seed) for path in files
    )
    lines = _lines(document for sample in samples for document in sample)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_LINE_BYTES,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=1,  # more would be no faster, and the count is written into the model
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{', '.join(map(str, inputs))}: cannot train {vocab_size:,} pieces on this text: "
            f"{str(error).strip()}; give more text or a smaller --vocab-size"
        ) from error
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, output)
    return load_tokenizer(output)


def _sample(documents: Iterable[Document], num_bytes: int, *, seed: int) -> list[Document]:
    """Documents in the order of a seeded hash of their text, until the size is reached."""
    keyed = sorted(documents, key=lambda document: _rank(document.text, seed))
    sample, total = [], 0
    for document in keyed:
        if total >= num_bytes:
            break
        sample.append(document)
        total += len(document.text.encode())
    return sample


def _rank(text: str, seed: int) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8, key=seed.to_bytes(8, "little")).digest()


def _lines(documents: Iterable[Document]) -> Iterator[str]:
    """Lines without their newline, which byte fallback spells; long lines are cut."""
    width = _MAX_LINE_BYTES // 4  # a character is at most four bytes
    for document in documents:
        for line in document.text.split("\n"):
            for start in range(0, len(line), width):
                yield line[start : start + width]
