"""Ways to tokenise: the library that defines a tokenizer, faster ones, and a guard before those.

A fast engine does not get to know control tokens, so that it cannot make one of typed text. The
guard sends to the reference every text that holds what the engine is known to make otherwise:
code points of which it has another opinion, added tokens that it would match differently.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)

Flat = tuple[NDArray[np.integer[Any]], NDArray[np.int64]]


class Engine(ABC):
    """A way to tokenise. ``name`` is the library, ``takes_special`` whether a special token that is
    typed in a text may become the token."""

    name: str
    takes_special: bool

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Flat:
        """Ids of all texts end to end [T], and the length of each [len(texts)]; no EOD."""


class ReferenceEngine(Engine):
    """The library that defines the tokenizer."""

    def __init__(self, tokenizer: Tokenizer, *, allow_special: bool = False) -> None:
        self.name = tokenizer.library
        self.takes_special = allow_special
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> Flat:
        ids = self._tokenizer.encode_batch(texts, allow_special=self.takes_special)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.uint32, int(lengths.sum())), lengths


class GigatokenEngine(Engine):
    """gigatoken, on the calling thread: the run's workers are processes."""

    name = "gigatoken"
    takes_special = False

    def __init__(self, tokenizer: Tokenizer, hidden: Sequence[str] = ()) -> None:
        import gigatoken

        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._engine = gigatoken.Tokenizer.from_json(tokenizer.without_control_tokens(hidden))
        elif isinstance(tokenizer, SentencePieceTokenizer):
            with NamedTemporaryFile(suffix=".model") as file:  # it reads files only
                file.write(tokenizer.without_control_tokens())
                file.flush()
                self._engine = gigatoken.Tokenizer.from_sentencepiece(file.name)
        else:
            # It knows the split patterns of OpenAI's encodings only, by file name.
            self._engine = gigatoken.Tokenizer.from_tiktoken(tokenizer.path, special_tokens={})

    def encode(self, texts: Sequence[str]) -> Flat:
        rows = self._engine.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


class FastokensEngine(Engine):
    """fastokens; its threads follow RAYON_NUM_THREADS."""

    name = "fastokens"
    takes_special = False

    def __init__(self, tokenizer: Tokenizer, hidden: Sequence[str] = ()) -> None:
        import fastokens

        if isinstance(tokenizer, HuggingFaceTokenizer):
            content = tokenizer.without_control_tokens(hidden)
            self._engine = fastokens.Tokenizer.from_json_str(content)
        elif isinstance(tokenizer, TiktokenTokenizer):
            self._engine = fastokens.Tokenizer.from_tiktoken(
                str(tokenizer.path), tokenizer.pattern, {}
            )
        else:
            raise ValueError("it reads no SentencePiece model")

    def encode(self, texts: Sequence[str]) -> Flat:
        ids, offsets = self._engine.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


FastKind = type[GigatokenEngine] | type[FastokensEngine]
FAST_ENGINES: tuple[FastKind, ...] = (GigatokenEngine, FastokensEngine)


@dataclass(frozen=True, slots=True)
class Routes:
    """Which texts an engine must not see: those with a code point of these ranges, first and last
    both within, or with one of these added tokens, which it does not know."""

    code_points: tuple[tuple[int, int], ...] = ()
    hidden: tuple[str, ...] = ()

    @property
    def num_code_points(self) -> int:
        return sum(last + 1 - first for first, last in self.code_points)


EVERY_TEXT = Routes()


class SpecialTokenFound(ValueError):
    """A special token is typed in a text; ``number`` is the text's."""

    def __init__(self, number: int, token: str) -> None:
        super().__init__(token)
        self.number = number
        self.token = token


class GuardedEngine(Engine):
    """A fast engine, and the reference for every text that is not for it."""

    def __init__(
        self, fast: Engine, tokenizer: Tokenizer, *, special_tokens: str, routes: Routes
    ) -> None:
        self.name, self.takes_special = fast.name, special_tokens == "allow"
        self._fast = fast
        self._reference = ReferenceEngine(tokenizer, allow_special=special_tokens == "allow")
        special = () if special_tokens == "text" else filter(None, tokenizer.special_tokens)
        self._special = _any_of(special)
        self._hidden = _any_of(routes.hidden)
        self._forbid = special_tokens == "error"
        self._differs: NDArray[np.bool_] | None = None
        if routes.code_points:
            self._differs = np.zeros(0x110000, np.bool_)
            for first, last in routes.code_points:
                self._differs[first : last + 1] = True

    def encode(self, texts: Sequence[str]) -> Flat:
        guarded = self._guarded(texts)
        if not guarded:
            return self._fast.encode(texts)
        mine = set(guarded)
        rest = [text for number, text in enumerate(texts) if number not in mine]
        exact = iter(_rows(self._reference.encode([texts[number] for number in guarded])))
        fast = iter(_rows(self._fast.encode(rest)) if rest else ())
        rows = [next(exact if number in mine else fast) for number in range(len(texts))]
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def _guarded(self, texts: Sequence[str]) -> list[int]:
        """Numbers of the texts that go to the reference."""
        found = set()
        if self._special is not None:
            for number, text in enumerate(texts):
                typed = self._special.search(text)
                if typed and self._forbid:
                    raise SpecialTokenFound(number, typed[0])
                if typed:
                    found.add(number)
        if self._hidden is not None:
            found |= {n for n, text in enumerate(texts) if self._hidden.search(text)}
        if self._differs is not None:
            others = [number for number, text in enumerate(texts) if not text.isascii()]
            if self._holds_differing("".join([texts[number] for number in others])):
                found |= {n for n in others if self._holds_differing(texts[n])}
        return sorted(found)

    def _holds_differing(self, text: str) -> bool:
        assert self._differs is not None
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        return bool(self._differs[code_points].any())


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    parts = [re.escape(token) for token in tokens]
    return re.compile("|".join(parts)) if parts else None


def guarded(engine: Engine, tokenizer: Tokenizer, special_tokens: str, routes: Routes) -> Engine:
    """The engine, behind a guard unless there is nothing that it must not see."""
    if special_tokens == "text" and routes == EVERY_TEXT:
        return engine
    return GuardedEngine(engine, tokenizer, special_tokens=special_tokens, routes=routes)


def _rows(flat: Flat) -> list[NDArray[np.integer[Any]]]:
    ids, lengths = flat
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


def first_difference(truth: Flat, found: Flat) -> int | None:
    """The number of the first text for which two engines give other ids; ``None`` for none."""
    if np.array_equal(truth[1], found[1]) and np.array_equal(truth[0], found[0]):
        return None
    pairs = zip(_rows(truth), _rows(found), strict=True)
    return next(n for n, (right, wrong) in enumerate(pairs) if not np.array_equal(right, wrong))


def differing(truth: Flat, found: Flat) -> list[int]:
    """The numbers of all texts for which two engines give other ids."""
    if first_difference(truth, found) is None:
        return []
    pairs = zip(_rows(truth), _rows(found), strict=True)
    return [n for n, (right, wrong) in enumerate(pairs) if not np.array_equal(right, wrong)]


def load_engine(tokenizer: Tokenizer, name: str, *, special_tokens: str, routes: Routes) -> Engine:
    """The engine that ``choose_engine`` named, in a worker of the run."""
    kinds = {kind.name: kind for kind in FAST_ENGINES}
    if name in kinds:
        engine: Engine = kinds[name](tokenizer, routes.hidden)
        return guarded(engine, tokenizer, special_tokens, routes)
    return guarded(ReferenceEngine(tokenizer), tokenizer, special_tokens, EVERY_TEXT)
