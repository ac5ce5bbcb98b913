"""How far a fast engine agrees with the reference: on every code point, on every added token.

A sample of texts cannot show that two libraries follow different versions of Unicode. So each code
point is tried in contexts that show its class: a byte-level tokenizer is given a model in which the
bytes at both ends of a code point merge with what stands beside them, so that its ids tell where
its pattern splits and where it does not, whatever the vocabulary of the real one. Then each code
point is tried with the real one, and each added token in, between and beside words.

This takes seconds and depends on the tokenizer and the versions of both libraries only. It is kept
in ``$XDG_CACHE_HOME/megatron-curr/engines`` (by default below ``~/.cache``).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from data_tools.engines import (
    EVERY_TEXT,
    Engine,
    FastKind,
    ReferenceEngine,
    Routes,
    differing,
    first_difference,
)
from megatron_curr.data.special_tokens import typed
from megatron_curr.data.tokenizer import (
    HuggingFaceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_curr.durable import write_once

_VERSION = 1  # of what is tried; a proof of another is made again
_GROUP = 512  # code points that are tried at once, for speed
_END = "</s>"
# A code point between small letters, capitals, digits, spaces, signs, line ends, and after a quote.
_CLASS_CONTEXTS = (*("aa{}aa", "AA{}Aa", "11{}11", "  {}  .", "..{}..\n", "\n{}\n\n", "'{}aa"),)
_NEIGHBOURS = "aA1 .\n'"
_TEXT_CONTEXTS = (" {}a ", "{}")
# Blocks of one class throughout: Chinese characters, Korean syllables, Tangut, private use, planes
# of which nothing is assigned. They are tried as runs in the first context: where the class changes
# inside a run, and where it is another than what stands before and after, the ids tell.
_UNIFORM = (
    *((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0xE000, 0xF900)),
    *((0x17000, 0x18D00), (0x20000, 0xE0000), (0xE1000, 0x110000)),
)
_SURROGATES = (0xD800, 0xE000)


@dataclass(frozen=True, slots=True)
class Proof:
    """What texts an engine must not see; or why it cannot be used at all."""

    routes: Routes = EVERY_TEXT
    refusal: str | None = None


def prove(kind: FastKind, tokenizer: Tokenizer) -> Proof:
    """The proof of an engine for a tokenizer, made now or kept from before.

    Raises whatever the engine raises for a tokenizer that it cannot load.
    """
    path = _kept_at(kind, tokenizer)
    with suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads(path.read_bytes())
        ranges = tuple((int(first), int(last)) for first, last in content["routes"]["code_points"])
        routes = Routes(ranges, tuple(content["routes"]["hidden"]))
        return Proof(routes, content["refusal"])
    made = _prove(kind, tokenizer)
    with suppress(OSError):  # a home that cannot be written only costs the time
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        write_once(path, json.dumps(asdict(made)))
    return made


def _kept_at(kind: FastKind, tokenizer: Tokenizer) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    content = [
        _VERSION,
        [kind.name, version(kind.name), tokenizer.library, version(tokenizer.library)],
        [tokenizer.sha256, sorted(tokenizer.special_tokens.items())],
        tokenizer.pattern if isinstance(tokenizer, TiktokenTokenizer) else "",
    ]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return Path(root) / "megatron-curr" / "engines" / f"{kind.name}-{key[:32]}.json"


def _prove(kind: FastKind, tokenizer: Tokenizer) -> Proof:
    hidden: tuple[str, ...] = ()
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found = _hidden(kind, tokenizer)
        if isinstance(found, str):
            return Proof(refusal=found)
        hidden = found
    with TemporaryDirectory() as folder:
        probe = _class_probe(tokenizer, Path(folder))
        differ = set() if probe is None else _differing(probe, kind(probe), _CLASS_CONTEXTS)
    differ |= _differing(tokenizer, kind(tokenizer, hidden), _TEXT_CONTEXTS, known=differ)
    ascii_only = [chr(code_point) for code_point in sorted(differ) if code_point < 0x80]
    if ascii_only:
        return Proof(refusal=f"differs from the reference on {ascii_only[0]!r}")
    return Proof(Routes(_ranges(differ), hidden))


def _hidden(kind: FastKind, tokenizer: HuggingFaceTokenizer) -> tuple[str, ...] | str:
    """The added tokens that the engine must not know, so that texts with them go to the reference;
    or why that is not enough.

    Those with a flag are never left to it: what surrounds them matters, which no list of texts
    exhausts.
    """
    added = tokenizer.added_tokens
    flagged = tuple(t for t, flags in added.items() if _has_flags(flags))
    texts = typed([*added, *tokenizer.special_tokens])
    texts += [f"a{one}{other}b" for one, other in pairwise(added)]
    truth = ReferenceEngine(tokenizer).encode(texts)
    refusal = ""
    for hidden in dict.fromkeys((flagged, tuple(added))):
        if tokenizer.normalizes and any(added[token].normalized for token in hidden):
            token = next(token for token in hidden if added[token].normalized)
            refusal = f"may match the added token {token!r} otherwise"
            continue
        seen = [n for n, text in enumerate(texts) if not any(token in text for token in hidden)]
        kept = ReferenceEngine(tokenizer).encode([texts[n] for n in seen]) if hidden else truth
        found = kind(tokenizer, hidden).encode([texts[n] for n in seen])
        wrong = first_difference(kept, found) if seen else None
        if wrong is None:
            return hidden
        refusal = f"differs from the reference, such as on {texts[seen[wrong]]!r}"
    return refusal


def _has_flags(token: Any) -> bool:
    return bool(token.single_word or token.lstrip or token.rstrip)


def _differing(
    tokenizer: Tokenizer,
    engine: Engine,
    contexts: Sequence[str],
    *,
    known: Collection[int] = (),
) -> set[int]:
    """The code points, but for the ``known``, with which the engine gives other ids than the
    reference in some context."""
    reference = ReferenceEngine(tokenizer)
    uniform = [number for first, end in _UNIFORM for number in range(first, end)]
    others = sorted(set(range(0x110000)).difference(uniform, range(*_SURROGATES)))
    found = set(known)
    for code_points, used, joined in ((uniform, contexts[:1], True), (others, contexts, False)):
        for context in used:
            before, after = context.split("{}")
            between = "" if joined else after + before
            left = [number for number in code_points if number not in found]
            groups = [left[n : n + _GROUP] for n in range(0, len(left), _GROUP)]
            found.update(_narrowed(groups, (before, between, after), reference, engine))
    return found.difference(known)


def _narrowed(
    groups: list[list[int]], context: tuple[str, str, str], reference: Engine, engine: Engine
) -> Iterator[int]:
    """The code points of groups that differ, found by trying ever smaller groups; all of a group
    of which no part differs alone. ``context`` is what stands before, between and after them."""
    before, between, after = context
    texts = [before + between.join(map(chr, group)) + after for group in groups]
    for group in (groups[n] for n in differing(reference.encode(texts), engine.encode(texts))):
        size = max(len(group) // 8, 1)
        parts = [group[n : n + size] for n in range(0, len(group), size)]
        found = list(_narrowed(parts, context, reference, engine)) if len(group) > 1 else []
        yield from found or group


def _ranges(code_points: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Runs of consecutive numbers, first and last both within."""
    ranges: list[tuple[int, int]] = []
    for number in sorted(code_points):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return tuple(ranges)


def _class_probe(tokenizer: Tokenizer, folder: Path) -> Tokenizer | None:
    """A tokenizer with the same splits, whose ids show them; ``None`` where it is not byte-level.

    Its tokens are the bytes and pairs: of a neighbour and a byte that only longer characters have,
    of a last byte and a first one. A pair merges unless the pattern splits between the two.
    """
    pairs = [
        pair
        for neighbour in _NEIGHBOURS.encode()
        for byte in range(0x80, 0x100)
        for pair in (bytes([neighbour, byte]), bytes([byte, neighbour]))
    ]
    pairs += [bytes([last, first]) for last in range(0x80, 0xC0) for first in range(0xC2, 0xF5)]
    if isinstance(tokenizer, TiktokenTokenizer):
        pieces = [*(bytes([byte]) for byte in range(256)), *pairs]
        path = folder / tokenizer.path.name  # an engine may know the pattern by the name
        path.write_bytes(
            b"".join(base64.b64encode(piece) + b" %d\n" % n for n, piece in enumerate(pieces))
        )
        facts = {"pattern": tokenizer.pattern, "special_tokens": {_END: len(pieces)}}
        path.with_suffix(".json").write_text(json.dumps(facts))
        return load_tokenizer(path)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return None
    content = json.loads(tokenizer.path.read_bytes())
    steps = json.dumps([content.get("pre_tokenizer"), content.get("normalizer")])
    if content["model"]["type"] != "BPE" or '"ByteLevel"' not in steps:
        return None
    letters = _byte_letters()
    merges = [[letters[pair[0]], letters[pair[1]]] for pair in pairs]
    pieces_of_text = [*letters, *map("".join, merges)]
    content["added_tokens"] = []
    content["truncation"] = content["padding"] = content["post_processor"] = None
    content["model"] |= {
        "vocab": {piece: n for n, piece in enumerate([*pieces_of_text, _END])},
        "merges": merges,
        "dropout": None,
        "unk_token": None,
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def _byte_letters() -> list[str]:
    """The letter by which a byte-level tokenizer writes each byte, as GPT-2 began it."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) if byte in plain else chr(256 + others.index(byte)) for byte in range(256)]
