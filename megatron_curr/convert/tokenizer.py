"""A run's tokenizer as Hugging Face files, checked token for token before they are kept.

A SentencePiece BPE model becomes a ``tokenizer.json``: every pair of pieces whose concatenation is
a piece is a merge, ranked by that piece's score. A ``tokenizer.json`` is copied. The result must
give the same ids as the run's own tokenizer on every text it is tried on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_curr.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from megatron_curr.errors import DataError

SPACE = "▁"
HARD_TEXTS = (
    "",
    " ",
    "a",
    " leading and trailing ",
    *(f"x{' ' * count}y" for count in range(1, 40)),
    *(" " * count for count in range(2, 20)),
    "\n\n\n\t\tdef f(x):\n\t    return x  # two  spaces\r\n",
    "0123456789 3.14159 1,000,000 0x1F -7e-12",
    "naïve café coöperate Ångström ﬁ ﬂ Ⅷ ① ½ x² ａｂｃ",
    "e\u0301 vs \u00e9; zero\u200bwidth, soft\u00adhyphen, nb\u00a0space, \ufeffmark",
    "日本語のテキスト 中文文本 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ff",
    f"a{SPACE}b {SPACE} {SPACE}{SPACE}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa =========== ----------- ...... ((((()))))",
    "<unk> <s> </s> <0x41> <|endoftext|> &amp; <!-- -->",
    "\x00\x01\x07\x1b[0m\x7f",
)


def write_tokenizer(
    source: str | Path, folder: Path, *, max_tokens: int, texts: Iterable[str] = ()
) -> Tokenizer:
    """Write the tokenizer's files into ``folder`` and return the run's own.

    ``texts`` are tried besides ``HARD_TEXTS``. Raises ``DataError`` that quotes the first text on
    which the two disagree.
    """
    ours = load_tokenizer(source)
    if isinstance(ours, SentencePieceTokenizer):
        document = _from_sentencepiece(ours)
        eod_token = document["added_tokens"][-1]["content"]
        (folder / "tokenizer.json").write_text(
            json.dumps(document, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
        shutil.copyfile(ours.path, folder / "tokenizer.model")
    else:
        shutil.copyfile(ours.path, folder / "tokenizer.json")
        eod_token = _token_of(ours.path, ours.eod_id)
    settings = {
        # Transformers 5 would write TokenizersBackend, a class that 4 does not have.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "bos_token": eod_token,
        "eos_token": eod_token,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    check_equal(ours, folder / "tokenizer.json", [*HARD_TEXTS, *texts])
    return ours


def check_equal(ours: Tokenizer, path: Path, texts: Sequence[str]) -> None:
    """Raise ``DataError`` unless ``path`` encodes and decodes every text as ``ours`` does."""
    import tokenizers

    published = tokenizers.Tokenizer.from_file(str(path))
    published.encode_special_tokens = True  # in our corpora a typed </s> is text, too
    encodings = published.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, expected, encoding in zip(
        texts, ours.encode_batch(list(texts)), encodings, strict=True
    ):
        if list(expected) != encoding.ids:
            place = _first_difference(expected, encoding.ids)
            raise DataError(
                f"{ours.path}: as {path.name} it gives other ids for {_excerpt(text)}: at token "
                f"{place} {expected[place : place + 4]} became {encoding.ids[place : place + 4]}; "
                "only SentencePiece BPE models without text normalisation convert exactly"
            )
        if published.decode(encoding.ids) != ours.decode(expected):
            raise DataError(f"{ours.path}: as {path.name} it decodes {_excerpt(text)} differently")


def _from_sentencepiece(ours: SentencePieceTokenizer) -> dict[str, Any]:
    """The ``tokenizer.json`` of a BPE model with byte fallback."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(ours.path))
    ids = range(pieces.vocab_size())
    controls = [token for token in ids if pieces.is_control(token) and token != ours.eod_id]
    special = [*controls, ours.eod_id]
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if pieces.encode("a", out_type=str)[0].startswith(SPACE):
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(token, pieces.id_to_piece(token)) for token in special],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces.id_to_piece(pieces.unk_id()),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(pieces.is_byte(token) for token in ids),
            "ignore_merges": False,
            "vocab": {pieces.id_to_piece(token): token for token in ids},
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: Any) -> list[list[str]]:
    """Pairs of pieces that merge into a piece, in the order in which SentencePiece merges them."""
    plain = {
        pieces.id_to_piece(token): token
        for token in range(pieces.vocab_size())
        if not (pieces.is_control(token) or pieces.is_byte(token) or pieces.is_unknown(token))
    }
    ranked = []
    for piece, token in plain.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in plain and right in plain:
                ranked.append((-pieces.get_score(token), token, plain[left], plain[right]))
    ranked.sort()
    return [[pieces.id_to_piece(left), pieces.id_to_piece(right)] for *_, left, right in ranked]


def _added_token(token: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": True}


def _token_of(path: Path, token: int) -> str:
    import tokenizers

    content: str | None = tokenizers.Tokenizer.from_file(str(path)).id_to_token(token)
    if content is None:
        raise DataError(f"{path}: its end token {token} has no text")
    return content


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second))
    )


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
