"""From captions to text features: one interface, opened by name.

* ``hashed:WIDTH``: hashed subwords, no weights; the default
* ``transformers:FOLDER``: any encoder saved by transformers, such as T5 or umT5

Legend: L text tokens, E width.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_curr.data.keyed import uniforms
from megatron_curr.data.tensor_file import Floats
from megatron_curr.data.video_manifest import TextRecord
from megatron_curr.errors import DataError

MAX_TOKENS = 300
_WORD = re.compile(r"\w+|[^\w\s]")
_END = "</s>"


class TextEncoder(Protocol):
    """What makes text features."""

    @property
    def record(self) -> TextRecord:
        """Everything that decides the features, as the manifest keeps it."""

    def encode(self, caption: str) -> Floats:
        """Features [L, E], at least one token even for the empty caption, at most the maximum."""


class HashedSubwords:
    """A token a word: the sum of seeded vectors of the word and its letter triples.

    Words that share letters are near each other, any word has a place, and the last token marks the
    end. The vectors are of unit variance and depend on nothing but the spelling.
    """

    def __init__(self, width: int) -> None:
        self.record = TextRecord(
            name=f"hashed:{width}",
            sha256=hashlib.sha256(f"hashed subwords 1 {width}".encode()).hexdigest(),
            width=width,
            max_tokens=MAX_TOKENS,
        )

    def encode(self, caption: str) -> Floats:
        words = _WORD.findall(caption.lower())[: MAX_TOKENS - 1]
        return np.stack([_word_vector(word, self.record.width) for word in [*words, _END]])


@lru_cache(maxsize=1 << 16)
def _word_vector(word: str, width: int) -> Floats:
    marked = f"<{word}>"
    parts = [marked, *(marked[at : at + 3] for at in range(len(marked) - 2))]
    total = np.zeros(width)
    for number, part in enumerate(parts):
        # Sums of uniforms are close enough to normal; the word itself outweighs its parts.
        draws = uniforms(0, f"subword {part}", np.arange(width), 3).sum(1) * 2 - 3
        total += draws * (2.0 if number == 0 else 1.0)
    vector: Floats = (total / np.sqrt(3 + len(parts))).astype(np.float32)
    return vector


class TransformersEncoder:
    """The last hidden states of an encoder, without padding, in the folder's own tokenization."""

    def __init__(self, folder: Path) -> None:
        from megatron_curr.data.diffusers_codec import folder_sha256

        self._tokenizer, self._model = _load(folder)
        self.record = TextRecord(
            name=f"transformers:{folder}",
            sha256=folder_sha256(folder),
            width=int(self._model.config.hidden_size),
            max_tokens=MAX_TOKENS,
        )

    def encode(self, caption: str) -> Floats:
        import torch

        ids = self._tokenizer(
            caption, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).input_ids
        if ids.shape[1] == 0:  # a tokenizer that marks no end
            ids = torch.tensor([[self._tokenizer.eos_token_id or 0]])
        with torch.inference_mode():
            features: Floats = self._model(input_ids=ids).last_hidden_state[0].float().numpy()
        return features


def _load(folder: Path) -> tuple[Any, Any]:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = transformers.AutoModel
        if getattr(config, "is_encoder_decoder", False) or config.model_type in ("t5", "umt5"):
            kind = getattr(transformers, f"{_family(config)}EncoderModel", kind)
        model = kind.from_pretrained(folder, local_files_only=True, config=config)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise DataError(
            f"transformers:{folder}: cannot be loaded ({error}); give a folder that holds an "
            "encoder and its tokenizer"
        ) from error
    return tokenizer, model.eval().requires_grad_(False)


def _family(config: Any) -> str:
    return type(config).__name__.removesuffix("Config")


def load_text_encoder(name: str) -> TextEncoder:
    """Raises ``DataError`` for an unknown name or a folder that cannot be loaded."""
    kind, _, place = name.partition(":")
    if kind == "hashed" and place.isdecimal() and int(place) > 0:
        return HashedSubwords(int(place))
    if kind == "transformers" and place:
        return TransformersEncoder(Path(place))
    raise DataError(f"text encoder {name!r}: use 'hashed:WIDTH' or 'transformers:FOLDER'")


def pad_text(features: Sequence[Floats]) -> tuple[Floats, np.ndarray[Any, np.dtype[np.int64]]]:
    """Features padded with zeros to the longest, [B, L, E], and their lengths [B]."""
    lengths = np.array([len(one) for one in features], np.int64)
    padded = np.zeros((len(features), int(lengths.max()), features[0].shape[1]), np.float32)
    for row, one in zip(padded, features, strict=True):
        row[: len(one)] = one
    return padded, lengths
