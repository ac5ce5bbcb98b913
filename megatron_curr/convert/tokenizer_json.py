"""``tokenizer.json`` of what is published in other forms: SentencePiece BPE, tiktoken ranks.

A merge is every pair of pieces whose concatenation is a piece, ranked by that piece's score or
rank, which is the order in which both libraries merge. The ids are proven elsewhere
(``tokenizer.py``); what is known not to come out equal has no document (``why_not_fast``).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_curr.data.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    read_model,
)
from megatron_curr.data.tokenizer import SentencePieceTokenizer, TiktokenTokenizer

SPACE = "▁"
_EVERY = 1 << 16  # of the spaces at the start of a text


class NotExact(ValueError):
    """Something for which ``tokenizer.json`` has no words."""


def sentencepiece_document(ours: SentencePieceTokenizer) -> dict[str, Any]:
    """The ``tokenizer.json`` of a BPE model. Raises ``NotExact``."""
    model = read_model(ours.path)
    pieces = {piece.piece: token for token, piece in enumerate(model.pieces)}
    kinds = [piece.type for piece in model.pieces]
    names = list(pieces)
    special = [token for token, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL)]
    special.sort(key=lambda token: token == ours.eod_id)  # it is the last
    plain = {name: token for name, token in pieces.items() if kinds[token] == NORMAL}
    symbols = [name for name, token in pieces.items() if kinds[token] == USER_DEFINED]
    spec, as_suffix = model.normalizer_spec, model.trainer_spec.treat_whitespace_as_suffix
    decoders = [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix or spec.remove_extra_whitespaces:
        first = 1 if not spec.remove_extra_whitespaces else _EVERY
        decoders.append({"type": "Strip", "content": " ", "start": first, "stop": 0})
    return _document(
        added=[_added_token(token, names[token]) for token in special],
        normalizer={"type": "Sequence", "normalizers": _normalizers(spec, as_suffix=as_suffix)},
        pre_tokenizer=_isolated(ours, symbols, pieces) if symbols else None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "unk_token": next(names[token] for token in special if kinds[token] == UNKNOWN),
            "fuse_unk": True,
            "byte_fallback": BYTE in kinds,
            # A symbol that stands alone is its piece.
            "ignore_merges": bool(symbols),
            "vocab": pieces,
            "merges": _merges(plain, {name: -model.pieces[t].score for name, t in plain.items()}),
        },
    )


def tiktoken_document(ours: TiktokenTokenizer) -> dict[str, Any]:
    """The ``tokenizer.json`` of byte-level ranks with their split pattern. Raises ``NotExact``."""
    lines = map(bytes.split, ours.path.read_bytes().splitlines())
    ranks = {_byte_letters(base64.b64decode(token)): int(rank) for token, rank in lines}
    if taken := sorted(ranks.keys() & ours.special_tokens.keys()):
        raise NotExact(f"the special token {taken[0]!r} is an ordinary one, too")
    # In the regular expressions of tiktoken `}+` never gives back; here it would repeat.
    pattern = ours.pattern.replace("}+", "}")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return _document(
        added=[_added_token(token, name) for name, token in ours.special_tokens.items()],
        normalizer=None,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{**split, "invert": False}, {**byte_level, "use_regex": False}],
        },
        decoder={**byte_level, "use_regex": True},
        model={
            "unk_token": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {**ranks, **ours.special_tokens},  # ids of added tokens may leave gaps
            "merges": _merges(ranks, ranks),
        },
    )


def _document(
    *,
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
    model: dict[str, Any],
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            **model,
        },
    }


def _normalizers(spec: Any, *, as_suffix: bool) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if spec.remove_extra_whitespaces:
        # Of its own mark, where it is typed, it strips what ends a text, and that alone.
        steps += [_replace_regex(rf"\A +|[ {SPACE}]+\z", ""), _replace_regex(" {2,}", " ")]
    if spec.add_dummy_prefix and as_suffix:
        steps.append({"type": "Replace", "pattern": {"Regex": r"(?<=(?m:.))\z"}, "content": SPACE})
    elif spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    return [*steps, _replace(" ", SPACE)]


def _isolated(
    ours: SentencePieceTokenizer, symbols: Sequence[str], pieces: Mapping[str, int]
) -> dict[str, Any]:
    """Cut at user-defined symbols, the longest first, as SentencePiece does before it merges.

    What stands between them is looked up whole before it is merged, because the symbols have to
    be: a text between them that happens to be a piece which no merges lead to (``<0x41>``,
    ``</s>``) is cut once more, where SentencePiece cuts it.
    """
    longest = sorted(symbols, key=lambda symbol: (-len(symbol), symbol))
    between = _Between(ours, longest)
    others = [name for name in pieces if name not in set(symbols)]
    odd = {
        name: ids
        for name, ids in zip(others, between.encode(others), strict=True)
        if ids != [pieces[name]]
    }
    guards = []
    for name, ids in odd.items():
        halves = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        cut = next(
            (half for half in halves if not odd.keys() & {*half} and between.joined(half) == ids),
            None,
        )
        if cut is None:
            raise NotExact(f"no merges lead to the piece {name!r}, and its text cannot be cut")
        guards.append(f"{re.escape(cut[0])}(?={re.escape(cut[1])}\\z)")
    cuts = [_split("|".join(map(re.escape, longest)))]
    if guards:
        cuts.append(_split(f"\\A(?:{'|'.join(guards)})"))
    return {"type": "Sequence", "pretokenizers": cuts}


class _Between:
    """What SentencePiece makes of texts that stand between two symbols."""

    def __init__(self, ours: SentencePieceTokenizer, symbols: Sequence[str]) -> None:
        self._ours = ours
        plain = (symbol for symbol in symbols if SPACE not in symbol and " " not in symbol)
        self._around = next(plain, symbols[0])
        self._edge = ours.encode(self._around * 2)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encoded = self._ours.encode_batch([f"{self._around}{text}{self._around}" for text in texts])
        # Two symbols alone are a prefix, the symbol twice, and a suffix.
        where = next(
            i for i in range(len(self._edge)) if self._edge[i : i + 1] * 2 == self._edge[i : i + 2]
        )
        return [ids[where + 1 : len(ids) - (len(self._edge) - where - 1)] for ids in encoded]

    def joined(self, texts: Sequence[str]) -> list[int]:
        return [token for ids in self.encode(texts) for token in ids]


def _merges(tokens: Mapping[str, int], ranks: Mapping[str, float]) -> list[list[str]]:
    """Pairs of tokens that merge into a token, the lowest rank of what they make first."""
    ranked = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in tokens and right in tokens:
                ranked.append((rank, tokens[token], tokens[left], tokens[right], left, right))
    ranked.sort()
    return [[left, right] for *_, left, right in ranked]


def _added_token(token: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": content, **flags, "special": True}


def _replace(text: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def _replace_regex(pattern: str, by: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": by}


def _split(pattern: str) -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


def _byte_letters(token: bytes) -> str:
    """Bytes as letters, each byte one, in the way of GPT-2 that ``ByteLevel`` has, too."""
    return "".join(map(_LETTERS.__getitem__, token))


def _letters() -> list[str]:
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


_LETTERS = _letters()
