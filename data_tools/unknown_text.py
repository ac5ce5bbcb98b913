"""How much of a text a tokenizer loses: characters that it does not know.

A tokenizer without byte fallback gives one unknown token for a run of such characters, or nothing
at all. Its tokens alone would tell too little, its characters nothing where whole words are
unknown, so both are counted and the larger share is held against the limit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.tokenizer import Tokenizer
from megatron_curr.errors import DataError

if TYPE_CHECKING:
    from data_tools.preprocess_text import Run
    from data_tools.unit_work import UnitRecord


@dataclass(frozen=True, slots=True)
class Unknown:
    """Unknown tokens of all tokens and unknown characters of all characters. All 0 for a tokenizer
    that loses nothing: nothing is counted then."""

    tokens: int = 0
    of_tokens: int = 0
    characters: int = 0
    of_characters: int = 0

    @property
    def share(self) -> float:
        return max(
            self.tokens / max(self.of_tokens, 1), self.characters / max(self.of_characters, 1)
        )

    def text(self) -> str:
        """What is lost, for people."""
        return (
            f"{self.tokens:,} of {self.of_tokens:,} tokens are unknown, and {self.characters:,} of "
            f"{self.of_characters:,} characters ({self.share:.2%})"
        )

    @classmethod
    def total(cls, parts: Iterable[Unknown]) -> Unknown:
        names = [field.name for field in fields(cls)]
        return reduce(
            lambda one, two: cls(*(getattr(one, name) + getattr(two, name) for name in names)),
            parts,
            cls(),
        )


def check_unknown(run: Run, records: Sequence[UnitRecord]) -> None:
    """Raise ``DataError`` where more is lost than the run allows."""
    unknown = Unknown.total(lost for record in records for lost in record.unknown.values())
    limit = run.settings.max_unknown_frac
    if unknown.share > limit:
        raise DataError(
            f"{run.output}: {unknown.text()}, more than --max-unknown {limit:g} allows: "
            f"{run.tokenizer.path} does not know this text, and what it does not know is lost. "
            "Nothing was published. Take a tokenizer with byte fallback, as `megatron-curr "
            "train-tokenizer` makes them, or allow more"
        )


class UnknownText:
    """Counts it for one tokenizer, and remembers which characters that knows."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, bool] = {}

    def count(
        self, texts: Sequence[str], ids: NDArray[np.integer[Any]], lengths: NDArray[np.int64]
    ) -> Unknown:
        """What is lost of some texts with these token ids end to end."""
        unknown_id = self._tokenizer.unknown_id
        if self._tokenizer.lossless:
            return Unknown()
        # Without an unknown token any text may have lost something without a trace.
        at = np.empty(0, np.int64) if unknown_id is None else np.flatnonzero(ids == unknown_id)
        told = np.unique(np.searchsorted(np.cumsum(lengths), at, side="right")).tolist()
        suspects = texts if unknown_id is None else [texts[number] for number in told]
        characters = sum(map(self._lost, suspects))
        return Unknown(len(at), len(ids), characters, sum(map(len, texts)))

    def _lost(self, text: str) -> int:
        return sum(text.count(character) for character in set(text) if not self._knows(character))

    def _knows(self, character: str) -> bool:
        known = self._known.get(character)
        if known is None:
            known = self._known[character] = self._tokenizer.knows(character)
        return known
