"""Which tokens of a tokenizer are control tokens, and its model with these under other names.

A control token is one whose kind says so (``special`` in a ``tokenizer.json``, a control piece of
SentencePiece) or that has a role: it ends or begins documents, or is named as ``pad_token``,
``additional_special_tokens`` and the like in the files beside the tokenizer. Typed in a text it is
text. Where a library would make the token of it all the same (a piece of a unigram model, a
user-defined symbol that ends documents), its model is loaded with these tokens under names that
nobody types; ids stay what they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_curr.errors import DataError

USUAL_EOD = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eod|>", "<eod>")
_SINGLE_ROLES = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
_LISTED_ROLES = ("additional_special_tokens", "extra_special_tokens")
# Classes of transformers that set a BOS before every text unless ``add_bos_token`` says otherwise.
_CLASSES_WITH_BOS = ("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "GemmaTokenizerFast")


@dataclass(frozen=True, slots=True)
class Roles:
    """What ``tokenizer_config.json`` and ``special_tokens_map.json`` of a folder say."""

    bos: str | None = None
    eos: str | None = None
    tokens: frozenset[str] = field(default_factory=frozenset)  # all that have a role
    adds_bos: bool = False  # what transformers does with a SentencePiece model


def read_roles(folder: Path) -> Roles:
    """Raises ``DataError`` for a file that is no JSON object."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the second has the say
        path = folder / name
        if not path.is_file():
            continue
        try:
            merged |= {k: v for k, v in json.loads(path.read_bytes()).items() if v is not None}
        except (ValueError, AttributeError) as error:
            raise DataError(f"{path}: is not a JSON object ({error})") from error
    single = {role: _content(merged.get(f"{role}_token")) for role in _SINGLE_ROLES}
    listed = [token for key in _LISTED_ROLES for token in _listed(merged.get(key))]
    adds_bos = merged.get("add_bos_token", merged.get("tokenizer_class") in _CLASSES_WITH_BOS)
    return Roles(
        bos=single["bos"],
        eos=single["eos"],
        tokens=frozenset(filter(None, [*single.values(), *listed])),
        adds_bos=bool(adds_bos),
    )


def _content(token: object) -> str | None:
    """A token, written as a string or as an added-token object."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _listed(tokens: object) -> Iterable[str | None]:
    if isinstance(tokens, dict):
        tokens = list(tokens.values())
    return map(_content, tokens) if isinstance(tokens, list) else ()


def typed(tokens: Iterable[str]) -> list[str]:
    """Texts in which each token stands alone, in and between words, and beside itself."""
    return [
        text
        for token in tokens
        for text in (
            token,
            f"a{token}b",
            f"a {token} b",
            f" {token} {token}",
            f"{token}{token}",
            f"1{token}2 \n {token}\n",
            f"({token}). {token},",
            f"é\u3000{token}\u00a0é",
        )
    ]


def rename_in_json(content: dict[str, Any], tokens: Collection[str], *, mark: str) -> None:
    """Give the tokens of a parsed ``tokenizer.json`` names that begin with ``mark``, in place.

    Their ids stay. Nothing is set before or after a text, cut, padded or drawn at random any more,
    and no pair of pieces merges into one of the tokens.
    """
    names = {token: f"{mark}-{number}" for number, token in enumerate(sorted(tokens))}
    for added in content.get("added_tokens") or []:
        added["content"] = names.get(added["content"], added["content"])
    content["truncation"] = content["padding"] = content["post_processor"] = None
    model = content["model"]
    if "dropout" in model:
        model["dropout"] = None
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        for token in names.keys() & vocab.keys():
            vocab[names[token]] = vocab.pop(token)
    elif vocab is not None:  # a unigram model: [piece, log probability]
        for entry in vocab:
            entry[0] = names.get(entry[0], entry[0])
    if model.get("merges"):
        model["merges"] = [merge for merge in model["merges"] if not _touches(merge, names)]


def _touches(merge: str | list[str], names: Mapping[str, str]) -> bool:
    """Whether a merge, in either of the two ways to write one, has a renamed token in it."""
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in names or right in names or left + right in names


def rename_in_sentencepiece(model: bytes, ids: Iterable[int], *, mark: str) -> bytes:
    """The same for some pieces of a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece in ids:
        proto.pieces[piece].piece = f"{mark}-{piece}"
    content: bytes = proto.SerializeToString()
    return content
