"""From the fields of one row to a document: filtered, rendered, normalised, hashed, described."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from typing import Any

import orjson

from data_tools.filters import Filter
from data_tools.options import Options, template_fields
from data_tools.rows import nested_fields
from megatron_curr.data.tokenizer import Tokenizer
from megatron_curr.errors import DataError

META_TOKENS = ("<meta>", "</meta>")
FILTERED = "filtered"


@dataclass(slots=True)
class Document:
    """One document that is to be tokenised.

    ``digest`` is 16 bytes of the text's sha256, without what is set before it. ``lead`` is control
    tokens and ``prefix`` the metadata text that go before the document and carry no loss.
    """

    text: str
    digest: bytes
    held_out: bool
    values: tuple[Any, ...]
    lead: tuple[int, ...]
    prefix: str | None


class Preparation:
    """The options, compiled. Raises ``DataError`` for tokens that the tokenizer does not have."""

    def __init__(self, options: Options, tokenizer: Tokenizer) -> None:
        self.options = options
        self._columns = options.columns
        self._nested = [name for name in options.needed_fields if "." in name]
        self._filter = None if options.filter is None else Filter(options.filter)
        self._template_fields = (
            []
            if options.template is None
            else list(dict.fromkeys(template_fields(options.template)))
        )
        self._control = options.control
        self.bos_ids = tokenizer.bos_ids(options.bos)
        self.bos_text = _bos_text(tokenizer, options.bos)
        special = tokenizer.special_tokens
        wanted = [*(self._control.tokens if self._control else ())]
        wanted += META_TOKENS if options.metadata_prefix else ()
        missing = [token for token in wanted if token not in special]
        if missing:
            raise DataError(
                f"{tokenizer.path}: has no special token {missing[0]!r}, which --control-tokens or "
                f"--metadata-prefix needs; it has {', '.join(special) or 'none'}. Train one with "
                "`megatron-curr train-tokenizer --special-token`"
            )
        self.control_ids = [
            special[token] for token in (self._control.tokens if self._control else ())
        ]
        self.meta_ids = [special[token] for token in META_TOKENS] if options.metadata_prefix else []

    def record(self) -> dict[str, Any]:
        """What the manifest says beside the options: the ids that stand for no text."""
        return {"control_token_ids": self.control_ids, "meta_token_ids": self.meta_ids}

    def document(self, content: Mapping[str, Any]) -> Document | str:
        """The document of some fields; ``FILTERED``, or the reason why there is none."""
        if self._nested:
            content = {**content, **nested_fields(content, self._nested)}
        if self._filter is not None:
            kept = self._filter(content)
            if kept is not True:
                return kept or FILTERED
        text = self._text(content)
        if not isinstance(text, str):
            return text[0]
        values: list[Any] = []
        for column in self._columns:
            value = content.get(column.name)
            if value is not None and (value := _cast(value, column.type)) is None:
                return f"metadata {column.name!r} is not {column.type}"
            values.append(value)
        lead = self._lead(content)
        if isinstance(lead, str):
            return lead
        raw = text.encode()
        if len(raw) > self.options.max_document_bytes:
            return f"longer than {self.options.max_document_bytes:,} bytes"
        digest = hashlib.sha256(raw).digest()[:16]
        return Document(
            text,
            digest,
            is_held_out(digest, self.options.heldout_frac),
            tuple(values),
            lead,
            self._prefix(content),
        )

    def _text(self, content: Mapping[str, Any]) -> str | tuple[str]:
        """The text, or in a tuple the reason why there is none."""
        if self.options.template is not None:
            missing = [name for name in self._template_fields if content.get(name) is None]
            if missing:
                return (f"no field {missing[0]!r}",)
            try:
                text: Any = self.options.template.format_map(content)
            except (ValueError, TypeError):
                return ("does not fit the template",)
        elif (text := content.get(self.options.text_field)) is None:
            name = self.options.text_field
            return (f"field {name!r} is null" if name in content else f"no field {name!r}",)
        if isinstance(text, bytes):  # a parquet column that does not say it is text
            try:
                text = text.decode()
            except UnicodeDecodeError:
                return ("invalid UTF-8",)
        if not isinstance(text, str):
            return (f"field {self.options.text_field!r} is not text",)
        for step in self.options.normalize:
            text = _normalized(text, step)
        return text or ("empty text",)

    def _lead(self, content: Mapping[str, Any]) -> tuple[int, ...] | str:
        if self._control is None:
            return ()
        score = _cast(content.get(self._control.field), "float")
        if score is None or score != score:
            return f"no score {self._control.field!r}"
        return (self.control_ids[bisect_right(self._control.bounds, score)],)

    def _prefix(self, content: Mapping[str, Any]) -> str | None:
        names = self.options.metadata_prefix
        known = [name for name in names if content.get(name) is not None]
        return "".join(f"{name}: {_as_text(content[name])}\n" for name in known) or None


def _bos_text(tokenizer: Tokenizer, wanted: str) -> str:
    """What documents begin with and why, in one line."""
    names = {number: token for token, number in tokenizer.special_tokens.items()}

    def named(ids: Iterable[int]) -> str:
        return " ".join(f"{names.get(number, 'token')} ({number})" for number in ids)

    ids, own = tokenizer.bos_ids(wanted), tokenizer.own_bos_ids
    if ids and wanted == "yes":
        return f"documents begin with {named(ids)}, as --bos yes asks"
    if ids:
        return (
            f"documents begin with {named(ids)}, as the tokenizer itself begins a text; --bos no "
            "leaves it out"
        )
    if own:
        return f"no BOS, as --bos no asks; the tokenizer itself begins a text with {named(own)}"
    if tokenizer.bos_id is None:
        return "no BOS before documents: the tokenizer names none"
    offer = named([tokenizer.bos_id])
    return f"no BOS before documents: the tokenizer itself sets none; --bos yes sets {offer}"


def is_held_out(digest: bytes, heldout_frac: float) -> bool:
    """Whether a document belongs to the held-out side: by its content hash alone, so the split
    stays when the corpus grows and a repeated document is never on both sides."""
    return int.from_bytes(digest[:8], "little") < heldout_frac * 2.0**64


def _normalized(text: str, step: str) -> str:
    if step == "newlines":
        return text.replace("\r\n", "\n").replace("\r", "\n")
    if step == "strip":
        return text.strip()
    return unicodedata.normalize(step.upper(), text)  # type: ignore[arg-type]


def _cast(value: object, kind: str) -> Any:
    """A value as one of the column types; ``None`` where it is not."""
    if kind == "str":
        return _as_text(value)
    if kind == "bool":
        return value if isinstance(value, bool) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind == "float":
        try:
            return float(value)
        except OverflowError:
            return None
    fits = value == value and abs(value) < 2**63 and int(value) == value
    return int(value) if fits else None


def _as_text(value: object) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, date | datetime):
        return value.isoformat()
    try:
        return orjson.dumps(value, default=str).decode()
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(value, ensure_ascii=False, default=str)
