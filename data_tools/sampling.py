"""A seeded sample of a run's own input, on which its engine is compared with the reference."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from data_tools.documents import Document
from data_tools.engines import Verdict, choose_engine
from data_tools.formats import DamagedFile, Span, open_rows

if TYPE_CHECKING:
    from data_tools.preprocess_text import Run

SAMPLE_CHARS = 256_000
_MAX_PLACES = 32
_MAX_TEXT_CHARS = 8_192


def check_engine(run: Run) -> Verdict:
    """Choose the run's engine. The sample depends on the input alone, so every array task, and a
    run that goes on, comes to the same end."""
    _, verdict = choose_engine(
        run.tokenizer,
        sample_texts(run),
        special_tokens=run.options.special_tokens,
        wanted=run.settings.engine,
    )
    return verdict


def sample_texts(run: Run) -> list[str]:
    """Texts from up to 32 places of the input, as they are tokenised."""
    draw = random.Random(run.plan_key)
    spans = [span for unit in run.units for span in unit.spans]
    chosen = draw.choices(spans, [span.num_bytes for span in spans], k=_MAX_PLACES)
    texts: list[str] = []
    for span in chosen:
        taken = 0
        with suppress(DamagedFile):  # the unit that holds it will say so
            for text in _texts(run, _from_within(span, draw)):
                texts.append(text)
                taken += len(text)
                if taken >= SAMPLE_CHARS // _MAX_PLACES:
                    break
    return texts


def _from_within(span: Span, draw: random.Random) -> Span:
    """The span from a random place in it, where any byte will do as a start."""
    if span.format.kind not in ("jsonl", "text") or span.format.compression is not None:
        return span
    return replace(span, first=span.first + draw.randrange(max(span.num_bytes // 2, 1)))


def _texts(run: Run, span: Span) -> Iterator[str]:
    limit = run.options.max_document_bytes
    for row in open_rows(span, fields=run.options.needed_fields, max_bytes=limit):
        if isinstance(row.content, dict):
            document = run.preparation.document(row.content)
            if isinstance(document, Document):
                yield document.text[:_MAX_TEXT_CHARS]
