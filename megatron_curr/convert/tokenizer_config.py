"""``tokenizer_config.json`` and the post-processor: what transformers makes of a tokenizer.

Training reads ``tokenizer.json`` or the model file, and puts no token before a text but the BOS
that preprocessing was asked for. transformers reads more: names of tokens, flags, a post-processor,
a class that may build another tokenizer. What of it agrees with training is kept as it is, the rest
is changed and told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_curr.data.sentencepiece_model import named_pieces, read_model
from megatron_curr.data.tokenizer import SentencePieceTokenizer, Tokenizer
from megatron_curr.errors import DataError

CONFIG, TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
FAST_CLASS = "PreTrainedTokenizerFast"
_SAME_CLASS = (
    None,
    FAST_CLASS,
    "TokenizersBackend",
)  # the last is its name in transformers 5 alone
_NAMES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass
class Settings:
    """The content of ``tokenizer_config.json``, and what in it is not as it was."""

    content: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def token(self, name: str) -> str | None:
        """The text of ``bos_token`` and its like; None where it is not named."""
        return _text(self.content.get(name))

    @property
    def named(self) -> set[str]:
        """Every token that transformers makes a special one, because it is named."""
        listed = (_listed(self.content.get(name)) for name in _LISTS)
        tokens = (*(self.content.get(name) for name in _NAMES), *chain.from_iterable(listed))
        return set(filter(None, map(_text, tokens)))


def read_settings(folder: Path | None, ours: Tokenizer) -> dict[str, Any]:
    """What the tokenizer's own files name; of a SentencePiece model, its own pieces else."""
    known: dict[str, Any] = {}
    if isinstance(ours, SentencePieceTokenizer):
        known = dict(named_pieces(read_model(ours.path), ours.eod_id))
    for name in (TOKENS_MAP, CONFIG) if folder else ():
        assert folder
        path = folder / name
        if path.is_file():
            try:
                known |= {
                    key: value
                    for key, value in dict(json.loads(path.read_bytes())).items()
                    if value is not None or key not in known
                }
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}: is not a JSON object ({error}); mend it") from error
    return known


def fast_settings(
    old: Mapping[str, Any],
    ours: Tokenizer,
    vocabulary: Mapping[str, int],
    *,
    added: Mapping[str, Mapping[str, Any]],
    begins_with: Sequence[str],
    max_tokens: int,
) -> Settings:
    """For a folder with a ``tokenizer.json``, whose added tokens are ``added``, by their text.

    ``begins_with`` is what training read before every document, usually nothing or a BOS.
    """
    new = Settings({key: value for key, value in old.items() if key != "auto_map"})
    keep_known_tokens(new, vocabulary)
    if "eos_token" not in new.content:
        ids = {token: text for text, token in vocabulary.items()}
        new.content["eos_token"] = ids[ours.eod_id]
    if len(begins_with) == 1:
        _set(new, "bos_token", begins_with[0])
    elif begins_with:  # transformers 5 would put bos_token in the place of them
        for name in ("add_bos_token", "add_eos_token"):
            new.content.pop(name, None)
    for name, value in (("add_bos_token", bool(begins_with)), ("add_eos_token", False)):
        if name in new.content:
            _set(new, name, value)
    if new.content.get("tokenizer_class") not in _SAME_CLASS:
        new.notes.append(
            f"{CONFIG}: tokenizer_class {new.content['tokenizer_class']} became {FAST_CLASS}, "
            "which takes everything from tokenizer.json"
        )
    decoder = {
        token: flags
        for token, flags in dict(new.content.get("added_tokens_decoder") or {}).items()
        if vocabulary.get(flags.get("content")) == int(token)
        and _flags(flags) == _flags(added.get(flags.get("content")))
    }
    if decoder != (new.content.get("added_tokens_decoder") or {}):
        new.notes.append(f"{CONFIG}: added_tokens_decoder is not tokenizer.json's: left out")
        del new.content["added_tokens_decoder"]
    # Transformers 5 would write TokenizersBackend, a class that 4 does not have.
    new.content |= {"tokenizer_class": FAST_CLASS, "model_max_length": max_tokens}
    new.content.setdefault("clean_up_tokenization_spaces", False)
    return new


def keep_known_tokens(new: Settings, vocabulary: Mapping[str, int]) -> None:
    """Leave out names of tokens that are not in the vocabulary: transformers would add them, with
    ids for which the model has no row."""
    for name in _NAMES:
        text = new.token(name)
        if text is not None and text not in vocabulary:
            new.notes.append(f"{CONFIG}: {name} {text!r} is not in the vocabulary: left out")
            new.dropped.append(text)
        if text is None or text not in vocabulary:
            new.content.pop(name, None)
    for name in _LISTS:
        tokens = new.content.get(name)
        unknown = [text for text in map(_text, _listed(tokens)) if text not in vocabulary]
        if unknown:
            new.notes.append(
                f"{CONFIG}: {name} {', '.join(map(repr, unknown))}: not in the vocabulary: left out"
            )
            new.dropped += filter(None, unknown)
            new.content[name] = (
                {key: token for key, token in tokens.items() if _text(token) in vocabulary}
                if isinstance(tokens, dict)
                else [token for token in tokens if _text(token) in vocabulary]
            )


def as_training_read(
    document: dict[str, Any], path: Path, *, begins_with: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """A ``tokenizer.json`` that puts before and after a text what training read there, and what was
    changed in it; the same object where nothing was."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    backend.no_truncation()
    backend.no_padding()
    new, notes = dict(document), []
    inner, whole = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before, after = whole[:start], whole[start + len(inner) :]
    wanted = [backend.token_to_id(token) for token in begins_with]
    if before != wanted or after:
        new["post_processor"] = _post_processor(document, begins_with, wanted)
        was = " and ".join(
            f"{' '.join(map(repr, map(backend.id_to_token, ids)))} {side} every text"
            for ids, side in ((before, "before"), (after, "after"))
            if ids
        )
        read = " ".join(map(repr, begins_with))
        read = f"{read} before every document" if read else "no such token"
        if path.suffix == ".json":  # other kinds have none that could be told of
            notes.append(
                f"{path}: its post-processor puts {was or 'nothing before a text'}; training read "
                f"{read} and so does the export"
            )
    for name in ("truncation", "padding"):
        if document.get(name):
            new[name] = None
            notes.append(f"{path}: {name} of every text, which training did not read, is off")
    if document["model"].get("dropout"):
        new["model"] = {**document["model"], "dropout": None}
        notes.append(f"{path}: dropout of merges, which training did not read, is off")
    return (document if new == document else new), notes


def _post_processor(
    document: Mapping[str, Any], begins_with: Sequence[str], ids: Sequence[int]
) -> dict[str, Any] | None:
    """The old one without templates, and what begins every document before each text."""
    old = document.get("post_processor") or {}
    steps = [step for step in old.get("processors", [old]) if step.get("type") == "ByteLevel"]
    if begins_with:
        start = [{"SpecialToken": {"id": token, "type_id": 0}} for token in begins_with]
        first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
        known = {
            token: {"id": token, "ids": [id], "tokens": [token]}
            for token, id in zip(begins_with, ids, strict=True)
        }
        template = {"single": [*start, first], "pair": [*start, first, *start, second]}
        steps.append({"type": "TemplateProcessing", **template, "special_tokens": known})
    if len(steps) < 2:
        return steps[0] if steps else None
    return {"type": "Sequence", "processors": steps}


def _set(settings: Settings, name: str, value: Any) -> None:
    old = settings.content.get(name)
    if old is not None and _text(old) != value and old != value:
        settings.notes.append(f"{CONFIG}: {name} {_text(old) or old!r} became {value!r}")
    if _text(old) != value:
        settings.content[name] = value


def _text(token: Any) -> str | None:
    """A token's text: it is written as a string, or as an added-token object."""
    text = token.get("content") if isinstance(token, Mapping) else token
    return text if isinstance(text, str) else None


def _listed(tokens: Any) -> list[Any]:
    """What is written as a list, or as a mapping of names of its own."""
    return [*tokens.values()] if isinstance(tokens, Mapping) else [*(tokens or [])]


def _flags(token: Mapping[str, Any] | None) -> tuple[bool, ...]:
    return tuple(bool((token or {}).get(name)) for name in _FLAGS)
