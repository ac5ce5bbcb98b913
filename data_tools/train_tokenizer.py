"""Train a tokenizer on a seeded sample of a corpus: SentencePiece, or byte-level BPE.

SentencePiece is BPE in the manner of Llama's, with byte fallback and single digits; text goes
through unchanged (no normalisation, every space and newline kept), so decoding gives the text back.
The one exception is SentencePiece's own space mark, U+2581: typed in a text it comes back as a
space. Ids 0 to 2 are ``<unk>``, ``<s>`` and ``</s>``, which is the EOD; then the special tokens,
then the 256 bytes.

Byte-level BPE is a Hugging Face folder. ``<|endoftext|>``, id 0, is the EOD; then the special
tokens, then the 256 bytes.
"""

from __future__ import annotations

import hashlib
import heapq
import io
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from data_tools.corpus import read_documents
from data_tools.input_files import find_files
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError

KINDS = ("sentencepiece", "bpe")
DEFAULT_VOCAB_SIZE = 8_192
DEFAULT_SAMPLE_BYTES = 6_000_000
NUM_RESERVED = 259  # three control tokens and the 256 bytes
EOD = "<|endoftext|>"
_MAX_LINE_BYTES = 4_192  # SentencePiece skips longer "sentences" with no more than a warning
_MAX_FILES = 64  # more are sampled themselves
# Words, numbers of up to three digits, punctuation, runs of spaces; as OpenAI's cl100k_base.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: Path,
    *,
    kind: str = "sentencepiece",
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    special_tokens: Sequence[str] = (),
    text_field: str = "text",
    seed: int = 1234,
) -> Tokenizer:
    """Train on a seeded sample, the same number of bytes of each file, and write ``output``.

    The same inputs, options and seed give the same file. Raises ``DataError`` when there is too
    little text for the vocabulary.
    """
    if kind not in KINDS:
        raise DataError(f"kind {kind!r}: must be one of {', '.join(KINDS)}")
    reserved = NUM_RESERVED + len(special_tokens)
    if vocab_size <= reserved:
        raise DataError(f"vocab_size {vocab_size}: the control tokens and bytes take {reserved}")
    files = find_files(inputs).files
    if len(files) > _MAX_FILES:
        files = sorted(random.Random(seed).sample(files, _MAX_FILES))
    samples = (
        _sample(read_documents(path, text_field=text_field), sample_bytes // len(files), seed=seed)
        for path in files
    )
    texts = (text for sample in samples for text in sample)
    first = next(texts, None)
    if first is None:
        raise DataError(
            f"{', '.join(map(str, inputs))}: no text in the field {text_field!r}; name the field "
            "of the text with --text-field"
        )
    train = _train_pieces if kind == "sentencepiece" else _train_bpe
    try:
        train(chain([first], texts), output, vocab_size, special_tokens)
    except (RuntimeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # a file or a disk, not the text
        raise DataError(
            f"{', '.join(map(str, inputs))}: cannot train {vocab_size:,} pieces on this text: "
            f"{str(error).strip()}; give more text or a smaller --vocab-size"
        ) from error
    return load_tokenizer(output)


def _train_pieces(
    texts: Iterable[str], output: Path, vocab_size: int, special_tokens: Sequence[str]
) -> None:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(texts),
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
        control_symbols=list(special_tokens),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,  # more would be no faster, and the count is written into the model
        minloglevel=2,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(output.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, output)


def _train_bpe(
    texts: Iterable[str], output: Path, vocab_size: int, special_tokens: Sequence[str]
) -> None:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    made = Backend(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD, *special_tokens],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if made.get_vocab_size() < vocab_size:
        raise RuntimeError(f"it gives no more than {made.get_vocab_size():,}")
    output.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOD,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    partial = output / "tokenizer.json.partial"
    made.save(str(partial))
    os.replace(partial, output / "tokenizer.json")


def _sample(texts: Iterable[str], num_bytes: int, *, seed: int) -> list[str]:
    """Texts in the order of a seeded hash, until the size is reached; holds no more than that."""
    held: list[tuple[int, int, str]] = []  # the last in the order first
    total = 0
    for number, text in enumerate(texts):
        rank = _rank(text, seed)
        heapq.heappush(held, (-rank, -number, text))
        total += len(text.encode())
        while total - (size := len(held[0][2].encode())) >= num_bytes and len(held) > 1:
            heapq.heappop(held)
            total -= size
    return [text for _, _, text in sorted(held, reverse=True)]


def _rank(text: str, seed: int) -> int:
    key = seed.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "big")


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines without their newline, which byte fallback spells; long lines are cut."""
    width = _MAX_LINE_BYTES // 4  # a character is at most four bytes
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), width):
                yield line[start : start + width]
