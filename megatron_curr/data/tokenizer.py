"""Text to token ids and back, by the library that defines each kind of tokenizer.

SentencePiece ``.model`` files, Hugging Face ``tokenizer.json`` and ``.tiktoken`` rank files. A
special token typed in a document's text is text: ``</s>`` or ``<|endoftext|>`` on a web page is
spelled out in ordinary pieces and never becomes a document boundary, unless ``allow_special`` asks
for it. No token is added at either end; preprocessing appends the EOD.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_curr.errors import DataError

_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "<eod>")
_LETTER = r"\p{Lm}\p{Lo}\p{M}"
# Split patterns and special tokens that OpenAI publishes with its rank files; source:
# tiktoken_ext/openai_public.py of tiktoken 0.14.
OPENAI_ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER}]*[\p{{Ll}}{_LETTER}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER}]+[\p{{Ll}}{_LETTER}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


class Tokenizer(ABC):
    """What every tokenizer answers. ``path`` is its model file, ``sha256`` that file's hash.

    ``library`` defines the ids; ``special_tokens`` are the control tokens by how they are typed.
    """

    library: str

    def __init__(
        self, path: Path, *, vocab_size: int, eod_id: int, special_tokens: Mapping[str, int]
    ) -> None:
        self.path = path
        self.name = path.parent.name if path.suffix == ".json" else path.stem
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocab_size = vocab_size
        self.eod_id = eod_id
        self.special_tokens = special_tokens

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        """Token ids of many texts, in order; the same for any number of threads.

        With ``allow_special`` a special token typed in a text becomes that token.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; EOD and other control tokens give nothing."""


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
            known = [pieces.piece_to_id(piece) for piece in _USUAL_EOD]
            eod_id = next((piece for piece in known if piece != pieces.unk_id()), -1)
        if eod_id < 0:
            raise DataError(f"{path}: has no end token; train it with an eos_id (usual: </s>)")
        special_tokens = {
            pieces.id_to_piece(piece): piece
            for piece in range(pieces.vocab_size())
            if pieces.is_control(piece) or pieces.is_unknown(piece)
        }
        super().__init__(
            path, vocab_size=pieces.vocab_size(), eod_id=eod_id, special_tokens=special_tokens
        )
        self._special = re.compile(f"({'|'.join(map(re.escape, special_tokens))})")

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        if allow_special:
            return [self._encode_allowing(text) for text in texts]
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=num_threads)
        return ids

    def _encode_allowing(self, text: str) -> list[int]:
        """The library has no such mode: what stands between special tokens is encoded alone."""
        pieces = filter(None, self._special.split(text))
        known = self.special_tokens
        return list(
            chain.from_iterable(
                [known[piece]] if piece in known else self._processor.encode(piece)
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
        eod_token = _eos_token(path.parent)
        candidates = [eod_token] if eod_token else [*_USUAL_EOD]
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
            special_tokens={token.content: key for key, token in added.items() if token.special},
        )

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        # The library takes its thread count from the process environment, not from a call.
        self._tokenizer.encode_special_tokens = not allow_special
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))


class TiktokenTokenizer(Tokenizer):
    """A ``.tiktoken`` rank file. It holds neither the split pattern nor the special tokens: both
    are known for OpenAI's encodings, by file name, or stand in a ``.json`` of that name beside it:
    ``{"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}}``."""

    library = "tiktoken"

    def __init__(self, path: Path) -> None:
        import tiktoken

        self.pattern, special_tokens = _tiktoken_facts(path)
        try:
            ranks = {
                base64.b64decode(token): int(rank)
                for token, rank in map(bytes.split, path.read_bytes().splitlines())
            }
            self._encoding = tiktoken.Encoding(
                path.stem,
                pat_str=self.pattern,
                mergeable_ranks=ranks,
                special_tokens=special_tokens,
            )
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: is not a .tiktoken rank file ({error})") from error
        eod_id = next((special_tokens[end] for end in _USUAL_EOD if end in special_tokens), None)
        if eod_id is None:
            raise DataError(
                f"{path}: no end token (looked for {', '.join(_USUAL_EOD)}); name it among the "
                f"special_tokens of {path.with_suffix('.json')}"
            )
        super().__init__(
            path,
            vocab_size=self._encoding.max_token_value + 1,
            eod_id=eod_id,
            special_tokens=special_tokens,
        )

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        if allow_special:
            return self._encoding.encode_batch(
                list(texts), num_threads=num_threads, allowed_special="all"
            )
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_tokens.values())
        return self._encoding.decode([int(token) for token in ids if int(token) not in special])


def _tiktoken_facts(path: Path) -> tuple[str, dict[str, int]]:
    """Split pattern and special tokens of a rank file. Raises ``DataError`` where unknown."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        try:
            return OPENAI_ENCODINGS[path.stem]
        except KeyError:
            known = ", ".join(OPENAI_ENCODINGS)
            raise DataError(
                f"{path}: a rank file has no split pattern, and {path.stem!r} is none of {known}; "
                f'write {{"pattern": ..., "special_tokens": {{...}}}} to {beside}'
            ) from None
    try:
        facts = json.loads(beside.read_bytes())
        return str(facts["pattern"]), {str(k): int(v) for k, v in facts["special_tokens"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{beside}: needs "pattern" and "special_tokens" of the rank file ({error!r})'
        ) from error


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a ``.model``, ``.tiktoken`` or ``tokenizer.json`` file, or in a folder.

    Raises ``DataError`` for anything else.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / "tokenizer.json", path / "tokenizer.model", *path.glob("*.tiktoken")]
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


def _eos_token(folder: Path) -> str | None:
    """``eos_token`` of a Hugging Face folder, written as a string or as an added-token object."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            token: Any = json.loads(path.read_bytes()).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: is not a JSON object ({error})") from error
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            return token
    return None
