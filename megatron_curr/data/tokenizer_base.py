"""What every tokenizer answers, whichever library defines its ids."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_curr.data.special_tokens import typed
from megatron_curr.errors import DataError


class Tokenizer(ABC):
    """What every tokenizer answers. ``path`` is its model file, ``sha256`` that file's hash.

    ``library`` defines the ids; ``special_tokens`` are the control tokens by how they are typed.
    ``bos_id`` is the token that begins texts, if one is known, and ``own_bos_ids`` what the
    tokenizer sets before a text of itself. ``unknown_id`` stands where text is lost, and
    ``lossless`` says that this cannot happen.
    """

    library: str
    bos_id: int | None = None
    own_bos_ids: tuple[int, ...] = ()
    unknown_id: int | None = None
    lossless: bool = True

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

    def knows(self, character: str) -> bool:
        """Whether a character of a text is found again in its ids."""
        return self.lossless or self.unknown_id not in self.encode(character)

    def bos_ids(self, wanted: str) -> tuple[int, ...]:
        """What ``--bos`` sets before each document: ``auto`` the tokenizer's own default, ``yes``
        its BOS, ``no`` nothing. Raises ``DataError`` where ``yes`` finds no BOS."""
        if wanted != "yes":
            return self.own_bos_ids if wanted == "auto" else ()
        if self.own_bos_ids:
            return self.own_bos_ids
        if self.bos_id is None:
            raise DataError(
                f"{self.path}: --bos yes, but it names no BOS; name one as {self.bos_named_in}"
            )
        return (self.bos_id,)

    @property
    def bos_named_in(self) -> str:
        """Where a tokenizer of this kind names its BOS, for messages."""
        return f"bos_token in {self.path.parent / 'tokenizer_config.json'}"

    def _makes_control_tokens(self) -> bool:
        """Whether a control token that is typed in a text would become the token."""
        control = set(self.special_tokens.values())
        texts = typed(self.special_tokens)
        return any(not control.isdisjoint(ids) for ids in self.encode_batch(texts))
