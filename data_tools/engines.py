"""The fastest library that gives exactly the ids of the one that defines the tokenizer.

A fast engine is used only after it was compared with the reference, on hard strings and on a
sample of the run's own input; on any difference the next one is tried, and the reference at last.
A text in which a special token is typed goes to the reference, where an engine knows such tokens.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
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
from megatron_curr.errors import DataError

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

    def __init__(self, tokenizer: Tokenizer) -> None:
        import gigatoken

        self.takes_special = isinstance(tokenizer, TiktokenTokenizer)
        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._engine = gigatoken.Tokenizer.from_json(_without_special(tokenizer))
        elif isinstance(tokenizer, SentencePieceTokenizer):
            with NamedTemporaryFile(suffix=".model") as file:  # it reads files only
                file.write(_with_special_renamed(tokenizer))
                file.flush()
                self._engine = gigatoken.Tokenizer.from_sentencepiece(file.name)
        else:
            # It knows the split patterns of OpenAI's encodings only, by file name.
            self._engine = gigatoken.Tokenizer.from_tiktoken(tokenizer.path)

    def encode(self, texts: Sequence[str]) -> Flat:
        rows = self._engine.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(rows.offsets.data)
        return np.asarray(rows.content.data)[offsets[0] : offsets[-1]], np.diff(offsets)


class FastokensEngine(Engine):
    """fastokens; its threads follow RAYON_NUM_THREADS."""

    name = "fastokens"
    takes_special = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        import fastokens

        if isinstance(tokenizer, HuggingFaceTokenizer):
            self._engine = fastokens.Tokenizer.from_json_str(_without_special(tokenizer))
        elif isinstance(tokenizer, TiktokenTokenizer):
            self._engine = fastokens.Tokenizer.from_tiktoken(
                str(tokenizer.path), tokenizer.pattern, {}
            )
        else:
            raise ValueError("it reads no SentencePiece model")

    def encode(self, texts: Sequence[str]) -> Flat:
        ids, offsets = self._engine.encode_batch_flat(list(texts), split_special_tokens=True)
        return np.frombuffer(ids, "<u4"), np.diff(np.frombuffer(offsets, "<u8").astype(np.int64))


FAST_ENGINES: tuple[type[GigatokenEngine] | type[FastokensEngine], ...] = (
    GigatokenEngine,
    FastokensEngine,
)


def _without_special(tokenizer: Tokenizer) -> str:
    """``tokenizer.json`` that does not know its special tokens, nor cuts or pads."""
    content = json.loads(tokenizer.path.read_bytes())
    added = content.get("added_tokens") or []
    content["added_tokens"] = [token for token in added if not token.get("special")]
    content["truncation"] = content["padding"] = content["post_processor"] = None
    return json.dumps(content, ensure_ascii=False)


def _with_special_renamed(tokenizer: SentencePieceTokenizer) -> bytes:
    """The model, its control pieces under names that nobody types: an engine may match the old
    ones in a text, where the reference never does."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    for piece in tokenizer.special_tokens.values():
        model.pieces[piece].piece = f"{tokenizer.sha256}-{piece}"
    content: bytes = model.SerializeToString()
    return content


class SpecialTokenFound(ValueError):
    """A special token is typed in a text; ``number`` is the text's."""

    def __init__(self, number: int, token: str) -> None:
        super().__init__(token)
        self.number = number
        self.token = token


class GuardedEngine(Engine):
    """A fast engine, and the reference for every text in which a special token is typed."""

    def __init__(self, fast: Engine, tokenizer: Tokenizer, *, special_tokens: str) -> None:
        self.name, self.takes_special = fast.name, special_tokens == "allow"
        self._fast = fast
        self._reference = ReferenceEngine(tokenizer, allow_special=special_tokens == "allow")
        special = map(re.escape, filter(None, tokenizer.special_tokens))
        self._special = re.compile("|".join(special) or r"(?!)")  # or one that matches nothing
        self._forbid = special_tokens == "error"

    def encode(self, texts: Sequence[str]) -> Flat:
        guarded = [number for number, text in enumerate(texts) if self._typed(text)]
        if not guarded:
            return self._fast.encode(texts)
        if self._forbid:
            raise SpecialTokenFound(guarded[0], self._typed(texts[guarded[0]]) or "")
        rows = _rows(self._fast.encode(texts))
        exact = _rows(self._reference.encode([texts[number] for number in guarded]))
        for number, row in zip(guarded, exact, strict=True):
            rows[number] = row
        return np.concatenate(rows), np.fromiter(map(len, rows), np.int64, len(rows))

    def _typed(self, text: str) -> str | None:
        found = self._special.search(text)
        return found and found[0]


def _guarded(engine: Engine, tokenizer: Tokenizer, special_tokens: str) -> Engine:
    """The engine, behind a guard unless special tokens are text and it does not know them."""
    if special_tokens == "text" and not engine.takes_special:
        return engine
    return GuardedEngine(engine, tokenizer, special_tokens=special_tokens)


def _rows(flat: Flat) -> list[NDArray[np.integer[Any]]]:
    ids, lengths = flat
    return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []


@dataclass(frozen=True, slots=True)
class Verdict:
    """Which engine was chosen and what that rests on; recorded in the manifest."""

    engine: str
    version: str
    reference: str
    reference_version: str
    compared_documents: int
    compared_chars: int
    passed_over: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """One line for people."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over.items())
        if self.engine == self.reference:
            return f"tokenizing with {self.engine} ({reasons or 'as asked'})"
        proof = f"equal to {self.reference} on {self.compared_documents:,} texts"
        return f"tokenizing with {self.engine}, {proof}" + (f" ({reasons})" if reasons else "")


def choose_engine(
    tokenizer: Tokenizer,
    sample: Sequence[str],
    *,
    special_tokens: str = "text",
    wanted: str = "auto",
) -> tuple[Engine, Verdict]:
    """The engine for a run, and why. ``sample`` is texts of the run's own input.

    Raises ``DataError`` for an engine that is not known, or that was asked for and is not exact.
    """
    names = [kind.name for kind in FAST_ENGINES]
    if wanted not in ("auto", "reference", *names):
        raise DataError(f"--engine {wanted}: known are auto, reference, {', '.join(names)}")
    texts = [*hard_strings(tokenizer), *sample]
    reference = ReferenceEngine(tokenizer, allow_special=special_tokens == "allow")
    truth: Flat | None = None
    passed_over: dict[str, str] = {}
    chosen: Engine | None = None
    for kind in FAST_ENGINES:
        if wanted not in ("auto", kind.name):
            continue
        try:
            fast = kind(tokenizer)
            mode = "allow" if special_tokens == "allow" else "text"
            guarded = _guarded(fast, tokenizer, mode)
            truth = truth or reference.encode(texts)
            reason = _difference(truth, guarded.encode(texts), texts)
        except ImportError:
            reason = "not installed"
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # each library has kinds of its own, a panic of Rust's too
            reason = f"cannot load this tokenizer ({error})"
        if reason is None:
            chosen = fast
            break
        passed_over[kind.name] = reason
    if chosen is None and wanted in names:
        raise DataError(
            f"--engine {wanted}: {passed_over[wanted]}; leave it out to have one chosen"
        )
    engine = _guarded(chosen or reference, tokenizer, special_tokens)
    return engine, Verdict(
        engine=engine.name,
        version=version(engine.name),
        reference=reference.name,
        reference_version=version(reference.name),
        compared_documents=len(texts) if truth else 0,
        compared_chars=sum(map(len, texts)) if truth else 0,
        passed_over=passed_over,
    )


def load_engine(tokenizer: Tokenizer, name: str, *, special_tokens: str) -> Engine:
    """The engine that ``choose_engine`` named, in a worker of the run."""
    kinds: dict[str, Callable[[Tokenizer], Engine]] = {kind.name: kind for kind in FAST_ENGINES}
    engine = kinds.get(name, ReferenceEngine)(tokenizer)
    return _guarded(engine, tokenizer, special_tokens)


def _difference(truth: Flat, found: Flat, texts: Sequence[str]) -> str | None:
    if np.array_equal(truth[1], found[1]) and np.array_equal(truth[0], found[0]):
        return None
    for text, right, wrong in zip(texts, _rows(truth), _rows(found), strict=True):
        if not np.array_equal(right, wrong):
            return f"differs from the reference, such as on {text[:40]!r}"
    raise AssertionError("arrays that differ hold a row that differs")


def hard_strings(tokenizer: Tokenizer) -> list[str]:
    """What tokenizers are known to disagree on: spaces, digits, joined marks, rare scripts."""
    special = list(tokenizer.special_tokens)[:8]
    spaces = [
        "",
        " ",
        "  ",
        "\n",
        " \n",
        "\n\n \n",
        "\t\t x",
        " " * 37 + "x",
        "x" + " " * 21,
        "\r\n\r",
    ]
    words = [
        *(
            "don't we'll I'VE it's'll 's ' s",
            "naïve café ﬁne Ǆ ß İı",
            "x\u0301\u0327 e\u0301 ñ n\u0303",
        ),
        *("1234567890 12 345 6.78e-9 ٣٤٥ ½ ²", "中文字符。日本語テキスト、한국어", "ก็ न्दी க்ஷ ខ្មែរ"),
        *(
            "👩\u200d👩\u200d👧 🏳️\u200d🌈 🇩🇪🇫 👍🏽",
            "\u00a0nbsp\u2003em\u3000wide\u200bzero\u2028line\u0085",
            "\ufeffbom\u0000nul\u0007",
        ),
        *("a\u2581b \u2581\u2581", "\U0010ffff\U000e0001 \ufffd", "\u202eabc\u202c שלום مرحبا"),
        *(
            "<0x0A> <0x41> [MASK] </ s> < s>",
            "/*--==>>::__**##!!?? ...",
            "{}[]()<>\"\"''`` \\n\\t",
            "ÀÁ" * 40,
        ),
        *(
            "a" * 300,
            "ab " * 200,
            "!?" * 150,
            "CamelCaseAndSNAKE_CASE_and-kebab",
            "https://e.org/?q=a%20b&c=#d",
        ),
    ]
    typed = [text for token in special for text in (token, f"a{token}b", f" {token} {token}")]
    return [*spaces, *words, *(f"{space}{word}" for word in words for space in (" ", "\n")), *typed]
