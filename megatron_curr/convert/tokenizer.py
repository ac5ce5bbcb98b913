"""A run's tokenizer as Hugging Face files, proven to read what training read.

Training reads ids from ``tokenizer.json``, a SentencePiece model or tiktoken ranks. Where an exact
``tokenizer.json`` exists, it is written and compared with the run's own tokenizer on every piece of
the vocabulary and on hard texts, by itself and as transformers loads it. Where none does, the model
file goes along as it is, with the class of transformers that asks SentencePiece itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_curr.convert.carried import LICENCE_FILES, TOKENIZER_FILES, copy, is_of
from megatron_curr.convert.tokenizer_config import (
    CONFIG,
    FAST_CLASS,
    TOKENS_MAP,
    Settings,
    as_training_read,
    fast_settings,
    keep_known_tokens,
    read_settings,
)
from megatron_curr.convert.tokenizer_json import (
    SPACE,
    NotExact,
    sentencepiece_document,
    tiktoken_document,
)
from megatron_curr.data.sentencepiece_model import read_model, why_not_fast
from megatron_curr.data.tokenizer import (
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megatron_curr.errors import DataError

JSON = "tokenizer.json"
# Asks SentencePiece for the ids and adds nothing; in transformers 4 and 5. Reads SLOW_FILE.
SLOW_CLASS, SLOW_FILE = "BertGenerationTokenizer", "spiece.model"
HARD_TEXTS = (
    "",
    " ",
    "a",
    " leading and trailing ",
    *(f"x{' ' * count}y" for count in range(1, 40)),
    *(" " * count for count in range(2, 20)),
    "\n\n\n\t\tdef f(x):\n\t    return x  # two  spaces\r\n",
    "0123456789 3.14159 1,000,000 0x1F -7e-12",
    "naïve café coöperate Ångström ﬁ ﬂ Ⅷ ① ½ x² ａｂｃ",
    "e\u0301 vs \u00e9; zero\u200bwidth, soft\u00adhyphen, nb\u00a0space, \ufeffmark",
    "日本語のテキスト 中文文本 한국어 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇫🇷 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0001f9ff",
    f"a{SPACE}b {SPACE} {SPACE}{SPACE}",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa =========== ----------- ...... ((((()))))",
    "<unk> <s> </s> <0x41> <|endoftext|> &amp; <!-- -->",
    "\x00\x01\x07\x1b[0m\x7f",
)


@dataclass(frozen=True)
class Published:
    """A tokenizer as it was written."""

    token_ids: Mapping[str, int | None]
    """``bos_token_id`` and its like, for config.json and generation_config.json."""
    loader: str | None
    """The class of transformers that reads what training read; None where there is none."""
    eos_token: str
    bos_token: str | None
    begins_with: tuple[str, ...]
    """What training read before every document."""
    spells_special: bool
    """Whether ``split_special_tokens`` reads special tokens that are typed as training did."""
    notes: tuple[str, ...]


def write_tokenizer(
    source: str | Path,
    folder: Path,
    *,
    max_tokens: int,
    begins_with: Sequence[int] = (),
    texts: Iterable[str] = (),
) -> Published:
    """Write the tokenizer's files into ``folder``, beside its config.json.

    ``begins_with`` are the ids that training read before every document. ``texts`` are tried
    besides ``HARD_TEXTS`` and every piece. A ``tokenizer.json`` that reads what training read is
    copied to the byte. Raises ``DataError`` for files that cannot be read.
    """
    ours = load_tokenizer(source)
    own = ours.path.parent
    belongs = Path(source).is_dir() or ours.path.name == JSON or (own / CONFIG).is_file()
    files = own if belongs else None
    old = read_settings(files, ours)
    tried = [*HARD_TEXTS, *texts]
    reason = why_not_fast(ours)
    if reason is None:
        try:
            return _write_fast(
                ours, files, folder, old, tried, max_tokens=max_tokens, begins_with=begins_with
            )
        except NotExact as error:
            if ours.path.name == JSON:
                raise DataError(f"{ours.path}: {error}; give another tokenizer") from error
            reason = str(error)
            (folder / JSON).unlink(missing_ok=True)
    notes = [f"{ours.path}: {reason}, so it has no exact {JSON} and goes along as it is"]
    return _write_slow(
        ours, files, folder, old, tried, notes, max_tokens=max_tokens, begins_with=begins_with
    )


def _write_fast(
    ours: Tokenizer,
    files: Path | None,
    folder: Path,
    old: Mapping[str, Any],
    texts: Sequence[str],
    *,
    max_tokens: int,
    begins_with: Sequence[int],
) -> Published:
    """Raises ``NotExact`` with the first text on which the two disagree."""
    if isinstance(ours, SentencePieceTokenizer):
        document = sentencepiece_document(ours)
    elif isinstance(ours, TiktokenTokenizer):
        document = tiktoken_document(ours)
    else:
        document = json.loads(ours.path.read_bytes())
    vocabulary = _vocabulary(document)
    start = tuple(_piece(ours, vocabulary, token) for token in begins_with)
    changed, notes = as_training_read(document, ours.path, begins_with=start)
    if ours.path.name == JSON and changed is document:
        shutil.copyfile(ours.path, folder / JSON)
    else:
        text = json.dumps(changed, ensure_ascii=False, indent=1) + "\n"
        (folder / JSON).write_text(text, encoding="utf-8")
    added = {token["content"]: token for token in document["added_tokens"]}
    settings = fast_settings(
        old, ours, vocabulary, added=added, begins_with=start, max_tokens=max_tokens
    )
    _write_files(ours, files, folder, settings)
    pieces = [ours.decode([token]) for token in sorted(vocabulary.values())]
    typed = [text for token in added for text in _around(token)]
    check_equal(ours, folder / JSON, [*texts, *typed, *pieces])
    loading = _load(ours, folder, [*texts, *typed], FAST_CLASS, begins_with, added)
    return _published(
        ours, settings, vocabulary, loading, start, (*notes, *settings.notes, *loading.notes)
    )


def _write_slow(
    ours: Tokenizer,
    files: Path | None,
    folder: Path,
    old: Mapping[str, Any],
    texts: Sequence[str],
    notes: list[str],
    *,
    max_tokens: int,
    begins_with: Sequence[int],
) -> Published:
    """The model file as it is, and what transformers needs to ask SentencePiece."""
    settings = Settings({key: value for key, value in old.items() if key != "auto_map"})
    vocabulary = dict(ours.special_tokens)
    loading = Loading(None, False, ())
    if isinstance(ours, SentencePieceTokenizer):
        pieces = read_model(ours.path).pieces
        vocabulary = {piece.piece: token for token, piece in enumerate(pieces)}
    keep_known_tokens(settings, vocabulary)
    settings.content.pop("added_tokens_decoder", None)
    start = tuple(_piece(ours, vocabulary, token) for token in begins_with)
    if isinstance(ours, SentencePieceTokenizer):
        shutil.copyfile(ours.path, folder / SLOW_FILE)
        others = [token for token in ours.special_tokens if token not in settings.named]
        settings.content |= {"tokenizer_class": SLOW_CLASS, "additional_special_tokens": others}
        # It has names of its own for these two, and would add tokens for them.
        unnamed = {"pad_token": None, "sep_token": None}
        settings.content = {**unnamed, **settings.content, "model_max_length": max_tokens}
    _write_files(ours, files, folder, settings)
    if isinstance(ours, SentencePieceTokenizer):
        typed = [text for token in ours.special_tokens for text in _around(token)]
        loading = _load(ours, folder, [*texts, *typed], SLOW_CLASS, (), ours.special_tokens)
        notes += loading.notes
        if start:
            notes.append(
                f"{CONFIG}: {SLOW_CLASS} puts no token before a text, and training read "
                f"{' '.join(map(repr, start))} there: put it before a text yourself"
            )
    return _published(ours, settings, vocabulary, loading, start, (*notes, *settings.notes))


def _published(
    ours: Tokenizer,
    settings: Settings,
    vocabulary: Mapping[str, int],
    loading: Loading,
    begins_with: tuple[str, ...],
    notes: tuple[str, ...],
) -> Published:
    bos, pad = settings.token("bos_token"), settings.token("pad_token")
    ids = {"bos_token_id": vocabulary.get(bos or ""), "eos_token_id": ours.eod_id}
    if pad:
        ids["pad_token_id"] = vocabulary[pad]
    eos = settings.token("eos_token") or _piece(ours, vocabulary, ours.eod_id)
    return Published(ids, loading.name, eos, bos, begins_with, loading.spells_special, notes)


def _write_files(ours: Tokenizer, files: Path | None, folder: Path, settings: Settings) -> None:
    """The tokenizer's own files and licences, but those that are written anew."""
    written = {JSON, CONFIG, "config.json", "generation_config.json"}
    if settings.dropped:
        written |= {TOKENS_MAP, "added_tokens.json"}
    left = []
    for path in sorted(files.iterdir()) if files else ():
        if is_of(path.name, ("tokenization_*.py",)):
            left.append(path.name)
        elif is_of(path.name, (*TOKENIZER_FILES, *LICENCE_FILES)) and path.name not in written:
            copy(path, folder / path.name)
    if left:
        settings.notes.append(f"left behind in {files}: {', '.join(left)}, which it does not need")
    if isinstance(ours, SentencePieceTokenizer):
        shutil.copyfile(ours.path, folder / "tokenizer.model")
    elif isinstance(ours, TiktokenTokenizer):
        for path in (ours.path, ours.path.with_suffix(".json")):
            copy(path, folder / path.name)
    own = files / CONFIG if files else None
    if own and own.is_file() and json.loads(own.read_bytes()) == settings.content:
        shutil.copyfile(own, folder / CONFIG)
        return
    text = json.dumps(settings.content, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def check_equal(ours: Tokenizer, path: Path, texts: Sequence[str]) -> None:
    """Raise ``NotExact`` unless ``path`` encodes and decodes every text as ``ours`` does.

    A special token that is typed is read as the token, where ``ours`` is told to, too.
    """
    import tokenizers

    published = tokenizers.Tokenizer.from_file(str(path))
    published.no_truncation()
    published.no_padding()
    special = {*ours.special_tokens.values()}
    encoded = published.encode_batch_fast(list(texts), add_special_tokens=False)
    for text, expected, found in zip(
        texts, ours.encode_batch(list(texts), allow_special=True), encoded, strict=True
    ):
        if list(expected) != found.ids:
            place = _first_difference(expected, found.ids)
            raise NotExact(
                f"as {path.name} it gives other ids for {_excerpt(text)}: at token {place} "
                f"{expected[place : place + 4]} became {found.ids[place : place + 4]}"
            )
        spoken = [token for token in expected if token not in special]
        if published.decode(spoken) != ours.decode(spoken):
            raise NotExact(f"as {path.name} it decodes {_excerpt(text)} differently")


@dataclass(frozen=True)
class Loading:
    """How transformers comes to read what training read."""

    name: str | None
    spells_special: bool
    notes: tuple[str, ...]


def _load(
    ours: Tokenizer,
    folder: Path,
    texts: Sequence[str],
    kind: str,
    begins_with: Sequence[int],
    added: Collection[str],
) -> Loading:
    """By which class it does, and what keeps others from it.

    ``added`` are the tokens that it finds in a text: typed special ones, too, as they are where
    preprocessing allows them.
    """
    import transformers

    notes: list[str] = []
    for name in ("AutoTokenizer", kind):
        version = f"{name} of transformers {transformers.__version__}"
        try:
            loaded = getattr(transformers, name).from_pretrained(folder, local_files_only=True)
            others = {*loaded.all_special_tokens} - {*added}  # named, and no more than pieces
            tried = [text for text in texts if not any(token in text for token in others)]
            found = loaded(tried)["input_ids"]
            spelled = loaded(tried, split_special_tokens=True)["input_ids"]
        except Exception as error:  # the library raises kinds of its own, and of what it calls
            why = str(error).strip().splitlines()[:1]
            notes.append(f"{version} cannot load the tokenizer: {''.join(why)}")
            continue
        wanted, as_text = (
            [[*begins_with, *ids] for ids in ours.encode_batch(tried, allow_special=allow)]
            for allow in (True, False)
        )
        bad = next((i for i, ids in enumerate(found) if ids != wanted[i]), None)
        if bad is None:
            return Loading(name, spelled == as_text, tuple(notes))
        notes.append(
            f"{version} takes {type(loaded).__name__}, which gives other ids, such as for "
            f"{_excerpt(tried[bad])}: {found[bad][:6]} where training read {wanted[bad][:6]}"
        )
    return Loading(None, False, tuple(notes))


def _vocabulary(document: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a ``tokenizer.json``, by its text."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(json.dumps(document))
    return backend.get_vocab(with_added_tokens=True)


def _piece(ours: Tokenizer, vocabulary: Mapping[str, int], token: int) -> str:
    found = next((text for text, known in vocabulary.items() if known == token), None)
    if found is None:
        raise DataError(f"{ours.path}: its token {token} has no text; give another tokenizer")
    return found


def _around(token: str) -> tuple[str, ...]:
    """A token that is typed, in and between words."""
    return (
        *(token, f" {token} {token}", f"a{token}b", f"{token}{token}", f"{token}a b"),
        *(f"a b {token}\n", f"A{token.upper()}", f"{token} {SPACE}"),
    )


def _first_difference(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second))
    )


def _excerpt(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}…")
