"""Text to token ids and back: SentencePiece ``.model`` files and Hugging Face ``tokenizer.json``.

A special token typed in a document's text is text: ``</s>`` or ``<|endoftext|>`` on a web page is
spelled out in ordinary pieces and never becomes a document boundary. No token is added at either
end; preprocessing appends the EOD.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_curr.errors import DataError

_USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "<eod>")


class Tokenizer(ABC):
    """What every tokenizer answers. ``path`` is its model file, ``sha256`` that file's hash."""

    def __init__(self, path: Path, *, vocab_size: int, eod_id: int) -> None:
        self.path = path
        self.name = path.stem if path.suffix == ".model" else path.parent.name
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.vocab_size = vocab_size
        self.eod_id = eod_id

    def encode(self, text: str) -> list[int]:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """Token ids of many texts, in order; the same for any number of threads."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; EOD and other control tokens give nothing."""


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file."""

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
        super().__init__(path, vocab_size=pieces.vocab_size(), eod_id=eod_id)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=num_threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._processor.decode([int(token) for token in ids]))


class HuggingFaceTokenizer(Tokenizer):
    """A folder with ``tokenizer.json``, or that file; the EOD is ``eos_token`` of its config."""

    def __init__(self, path: Path) -> None:
        import tokenizers

        try:
            # The library raises a bare Exception for a file it cannot parse.
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise DataError(f"{path}: is not a Hugging Face tokenizer ({error})") from error
        self._tokenizer.encode_special_tokens = True
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
        super().__init__(path, vocab_size=max(vocabulary.values()) + 1, eod_id=eod_id)

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        # The library takes its thread count from the process environment, not from a call.
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a ``.model`` file, a ``tokenizer.json``, or a folder that holds either.

    Raises ``DataError`` for anything else.
    """
    path = Path(path)
    if path.is_dir():
        inside = [path / "tokenizer.json", path / "tokenizer.model"]
        found = next((candidate for candidate in inside if candidate.is_file()), None)
        if found is None:
            raise DataError(f"{path}: neither tokenizer.json nor tokenizer.model in this folder")
        path = found
    if not path.is_file():
        raise DataError(
            f"{path}: no such tokenizer; give a SentencePiece .model or a Hugging Face folder, or "
            "make one with `megatron-curr train-tokenizer`"
        )
    return HuggingFaceTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)


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
