"""Text to token ids and back, by the library that defines each kind of tokenizer.

SentencePiece ``.model`` files, Hugging Face ``tokenizer.json`` and ``.tiktoken`` rank files. A
control token (``special_tokens.py``) typed in a document's text is text: ``</s>`` or
``<|endoftext|>`` on a web page is spelled out in ordinary pieces and never becomes a document
boundary, unless ``allow_special`` asks for it. What a tokenizer knows as a word of the text itself,
a user-defined symbol or an added token that is not special, stays that token. No token is added at
either end; preprocessing sets the BOS and the EOD. Nothing is drawn at random: a dropout that the
file still has is off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

from megatron_curr.data.special_tokens import (
    USUAL_EOD,
    read_roles,
    rename_in_json,
    rename_in_sentencepiece,
)
from megatron_curr.data.tiktoken_ranks import TiktokenTokenizer
from megatron_curr.data.tokenizer_base import Tokenizer
from megatron_curr.errors import DataError

__all__ = [
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "TiktokenTokenizer",
    "Tokenizer",
    "load_tokenizer",
]
_NUM_BYTES = 256


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

    library = "sentencepiece"

    def __init__(self, path: Path) -> None:
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (OSError, RuntimeError) as error:
            raise DataError(
                f"{path}: is not a SentencePiece model ({str(error).strip() or 'cannot be read'}); "
                "make one with `megatron-curr train-tokenizer`"
            ) from error
        pieces = self._processor
        eod_id = pieces.eos_id()
        if eod_id < 0:
            known = [pieces.piece_to_id(piece) for piece in USUAL_EOD]
            eod_id = next((piece for piece in known if piece != pieces.unk_id()), -1)
        if eod_id < 0:
            raise DataError(f"{path}: has no end token; train it with an eos_id (usual: </s>)")
        roles = read_roles(path.parent)
        special_tokens = {
            pieces.id_to_piece(piece): piece
            for piece in range(pieces.vocab_size())
            if pieces.is_control(piece)
            or pieces.is_unknown(piece)
            or piece == eod_id
            or pieces.id_to_piece(piece) in roles.tokens
        }
        super().__init__(
            path, vocab_size=pieces.vocab_size(), eod_id=eod_id, special_tokens=special_tokens
        )
        self.bos_id = (
            pieces.bos_id() if pieces.bos_id() >= 0 else special_tokens.get(roles.bos or "")
        )
        if roles.adds_bos and self.bos_id is not None:
            self.own_bos_ids = (self.bos_id,)
        self.unknown_id = pieces.unk_id()
        self.lossless = sum(map(pieces.is_byte, range(pieces.vocab_size()))) == _NUM_BYTES
        self._special = re.compile(f"({'|'.join(map(re.escape, special_tokens))})")
        self._as_text = pieces
        if self._makes_control_tokens():
            self._as_text = sentencepiece.SentencePieceProcessor(
                model_proto=self.without_control_tokens()
            )

    def without_control_tokens(self) -> bytes:
        """The model that does not know its control tokens."""
        return rename_in_sentencepiece(
            self.path.read_bytes(), self.special_tokens.values(), mark=self.sha256
        )

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        if allow_special:
            return [self._encode_allowing(text) for text in texts]
        ids: list[list[int]] = self._as_text.encode(list(texts), num_threads=num_threads)
        return ids

    def _encode_allowing(self, text: str) -> list[int]:
        """The library has no such mode: what stands between special tokens is encoded alone."""
        pieces = filter(None, self._special.split(text))
        known = self.special_tokens
        return list(
            chain.from_iterable(
                [known[piece]] if piece in known else self._as_text.encode(piece)
                for piece in pieces
            )
        )

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in ids]))


class HuggingFaceTokenizer(Tokenizer):
    """A folder with ``tokenizer.json``, or that file; the EOD is ``eos_token`` of its config."""

    library = "tokenizers"

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            # The library raises a bare Exception for a file it cannot parse.
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise DataError(f"{path}: is not a Hugging Face tokenizer ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if hasattr(self._tokenizer.model, "dropout"):
            self._tokenizer.model.dropout = None
        roles = read_roles(path.parent)
        candidates = [roles.eos] if roles.eos else [*USUAL_EOD]
        eod_id = next((vocabulary[token] for token in candidates if token in vocabulary), None)
        if eod_id is None:
            raise DataError(
                f"{path}: no end token (looked for {', '.join(candidates)}); name it as eos_token "
                f"in {path.parent / 'tokenizer_config.json'}"
            )
        added = self._tokenizer.get_added_tokens_decoder()
        super().__init__(
            path,
            vocab_size=max(vocabulary.values()) + 1,
            eod_id=eod_id,
            special_tokens={
                token.content: key
                for key, token in added.items()
                if token.special or token.content in roles.tokens or key == eod_id
            }
            | {token: eod_id for token in candidates if vocabulary.get(token) == eod_id},
        )
        self.bos_id = vocabulary.get(roles.bos or "")
        self.own_bos_ids = self._set_before_a_text()
        self._find_what_is_lost(vocabulary)
        self.normalizes = self._tokenizer.normalizer is not None
        # Content and flags of what the file calls words of the text itself.
        self.added_tokens = {
            token.content: token
            for token in added.values()
            if token.content not in self.special_tokens
        }
        self._as_text = self._tokenizer
        if self._makes_control_tokens():
            self._as_text = tokenizers.Tokenizer.from_str(self.without_control_tokens())

    def _set_before_a_text(self) -> tuple[int, ...]:
        """What the post-processor of the file does, which is what transformers does with it."""
        self._tokenizer.encode_special_tokens = False
        marked = self._tokenizer.encode("a", add_special_tokens=True)
        body = self._tokenizer.encode("a", add_special_tokens=False).ids
        before = next(
            (at for at in range(len(marked.ids)) if marked.ids[at : at + len(body)] == body), 0
        )
        return tuple(marked.ids[:before])

    def _find_what_is_lost(self, vocabulary: Mapping[str, int]) -> None:
        """A BPE loses nothing where it has all bytes, as letters or as pieces such as ``<0x0A>``;
        else it gives the unknown token or, without one, leaves the character out."""
        from tokenizers.pre_tokenizers import ByteLevel

        model = self._tokenizer.model
        kind = type(model).__name__
        unknown, fallback = (
            getattr(model, "unk_token", None),
            getattr(model, "byte_fallback", False),
        )
        if kind == "Unigram":  # the library does not tell
            content = json.loads(self.path.read_bytes())["model"]
            place, fallback = content.get("unk_id"), content.get("byte_fallback", False)
            unknown = None if place is None else content["vocab"][place][0]
        self.unknown_id = vocabulary.get(unknown or "")
        byte_pieces = fallback and all(f"<0x{n:02X}>" in vocabulary for n in range(_NUM_BYTES))
        byte_letters = set(ByteLevel.alphabet()) <= vocabulary.keys() and "".join(
            self._spelled("\u00e9")
        ).endswith("\u00c3\u00a9")
        self.lossless = byte_pieces or (kind == "BPE" and byte_letters)
        self._vocabulary = vocabulary

    def _spelled(self, text: str) -> list[str]:
        """The words of a text as the model gets them."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        if self._tokenizer.pre_tokenizer is None:
            return [text]
        return [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]

    def knows(self, character: str) -> bool:
        if self.lossless or self.unknown_id is not None:
            return super().knows(character)
        suffix = getattr(self._tokenizer.model, "end_of_word_suffix", None) or ""
        return all(
            letter in self._vocabulary or letter + suffix in self._vocabulary
            for word in self._spelled(character)
            for letter in word
        )

    def without_control_tokens(self, also: Sequence[str] = ()) -> str:
        """``tokenizer.json`` that does not know its control tokens, nor the added tokens ``also``,
        and sets, cuts and pads nothing."""
        content = json.loads(self.path.read_bytes())
        rename_in_json(content, {*self.special_tokens, *also}, mark=self.sha256)
        return json.dumps(content, ensure_ascii=False)

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        # The library takes its thread count from the process environment, not from a call.
        tokenizer = self._tokenizer if allow_special else self._as_text
        tokenizer.encode_special_tokens = not allow_special
        encodings = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a ``.model``, ``.tiktoken`` or ``tokenizer.json`` file, or in a folder.

    Raises ``DataError`` for anything else.
    """
    path = Path(path)
    if path.is_dir():
        inside = [
            path / "tokenizer.json",
            path / "tokenizer.model",
            *sorted(path.glob("*.tiktoken")),
        ]
        found = next((candidate for candidate in inside if candidate.is_file()), None)
        if found is None:
            raise DataError(
                f"{path}: neither tokenizer.json nor tokenizer.model nor a .tiktoken file in this "
                "folder"
            )
        path = found
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer; give a SentencePiece .model, a Hugging Face folder or a "
            ".tiktoken file, or make one with `megatron-curr train-tokenizer`"
        )
    kinds: dict[str, Callable[[Path], Tokenizer]] = {
        ".json": HuggingFaceTokenizer,
        ".tiktoken": TiktokenTokenizer,
    }
    return kinds.get(path.suffix, SentencePieceTokenizer)(path)
