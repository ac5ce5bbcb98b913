"""A seeded sample of a run's own input, on which its engine is compared with the reference.

A worker does it: the libraries are loaded there already, and the run itself never loads an engine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from data_tools.documents import Document, Preparation
from data_tools.engine_choice import Verdict, choose_engine
from data_tools.formats import open_rows
from data_tools.rows import DamagedFile, Span
from data_tools.unit_work import Job, unchanged_tokenizer
from data_tools.workers import Desk, Workers

if TYPE_CHECKING:
    from data_tools.preprocess_text import Run

SAMPLE_CHARS = 256_000
_MAX_PLACES = 32
_MAX_TEXT_CHARS = 8_192


def check_engine(run: Run, workers: Workers, job: Job) -> Verdict:
    """Choose the engine of the run, where ``job`` names the wanted one. The sample depends on the
    input alone, so every array task, and a run that goes on, comes to the same end. Raises
    ``DataError``."""
    draw = random.Random(run.plan_key)
    spans = [span for unit in run.units for span in unit.spans]
    chosen = draw.choices(spans, [span.num_bytes for span in spans], k=_MAX_PLACES)
    task = (job, [_from_within(span, draw) for span in chosen])
    results = workers.run(_choose, [task], name_of=lambda task: "a sample, to choose an engine")
    ((_, verdict),) = results
    if isinstance(verdict, Exception):
        raise verdict
    return verdict


def _from_within(span: Span, draw: random.Random) -> Span:
    """The span from a random place in it, where any byte will do as a start."""
    if span.format.kind not in ("jsonl", "text") or span.format.compression is not None:
        return span
    return replace(span, first=span.first + draw.randrange(max(span.num_bytes // 2, 1)))


def _choose(task: tuple[Job, Sequence[Span]], desk: Desk) -> Verdict:
    job, spans = task
    tokenizer = unchanged_tokenizer(job.tokenizer, job.tokenizer_sha256)
    preparation = Preparation(job.options, tokenizer)
    texts: list[str] = []
    for span in spans:
        taken = 0
        with suppress(DamagedFile):  # the unit that holds it will say so
            for text in _texts(preparation, span):
                texts.append(text)
                taken += len(text)
                if taken >= SAMPLE_CHARS // _MAX_PLACES:
                    break
    _, verdict = choose_engine(
        tokenizer, texts, special_tokens=job.options.special_tokens, wanted=job.engine
    )
    return verdict


def _texts(preparation: Preparation, span: Span) -> Iterator[str]:
    options = preparation.options
    for row in open_rows(span, fields=options.needed_fields, max_bytes=options.max_document_bytes):
        if isinstance(row.content, dict):
            document = preparation.document(row.content)
            if isinstance(document, Document):
                yield document.text[:_MAX_TEXT_CHARS]
