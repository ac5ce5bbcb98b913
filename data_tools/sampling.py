"""A seeded sample of a run's own input, on which its engine is compared with the reference.

A worker does it: the libraries are loaded there already, and the run itself never loads an engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from data_tools.documents import Document, Preparation
from data_tools.engines import Verdict, choose_engine
from data_tools.formats import DamagedFile, Span, open_rows
from data_tools.options import Options
from data_tools.unit_work import unchanged_tokenizer
from data_tools.workers import Desk, Workers

if TYPE_CHECKING:
    from data_tools.preprocess_text import Run

SAMPLE_CHARS = 256_000
_MAX_PLACES = 32
_MAX_TEXT_CHARS = 8_192


@dataclass(frozen=True)
class _Check:
    """What the choice of an engine rests on."""

    tokenizer: str
    tokenizer_sha256: str
    options: Options
    wanted: str
    spans: tuple[Span, ...]


def check_engine(run: Run, workers: Workers) -> Verdict:
    """Choose the run's engine. The sample depends on the input alone, so every array task, and a
    run that goes on, comes to the same end. Raises ``DataError``."""
    draw = random.Random(run.plan_key)
    spans = [span for unit in run.units for span in unit.spans]
    chosen = draw.choices(spans, [span.num_bytes for span in spans], k=_MAX_PLACES)
    check = _Check(
        str(run.tokenizer.path),
        run.tokenizer.sha256,
        run.options,
        run.settings.engine,
        tuple(_from_within(span, draw) for span in chosen),
    )
    results = workers.run(_choose, [check], name_of=lambda check: "a sample, to choose an engine")
    ((_, verdict),) = results
    if isinstance(verdict, Exception):
        raise verdict
    return verdict


def _from_within(span: Span, draw: random.Random) -> Span:
    """The span from a random place in it, where any byte will do as a start."""
    if span.format.kind not in ("jsonl", "text") or span.format.compression is not None:
        return span
    return replace(span, first=span.first + draw.randrange(max(span.num_bytes // 2, 1)))


def _choose(check: _Check, desk: Desk) -> Verdict:
    tokenizer = unchanged_tokenizer(check.tokenizer, check.tokenizer_sha256)
    preparation = Preparation(check.options, tokenizer)
    texts: list[str] = []
    for span in check.spans:
        with suppress(DamagedFile):  # the unit that holds it will say so
            texts += _beginning(_texts(preparation, span))
    _, verdict = choose_engine(
        tokenizer, texts, special_tokens=check.options.special_tokens, wanted=check.wanted
    )
    return verdict


def _texts(preparation: Preparation, span: Span) -> Iterator[str]:
    options = preparation.options
    for row in open_rows(span, fields=options.needed_fields, max_bytes=options.max_document_bytes):
        if isinstance(row.content, dict):
            document = preparation.document(row.content)
            if isinstance(document, Document):
                yield document.text[:_MAX_TEXT_CHARS]


def _beginning(texts: Iterator[str]) -> Sequence[str]:
    """The first of them, up to a place's share of the sample."""
    taken: list[str] = []
    num_chars = 0
    for text in texts:
        taken.append(text)
        num_chars += len(text)
        if num_chars >= SAMPLE_CHARS // _MAX_PLACES:
            break
    return taken
