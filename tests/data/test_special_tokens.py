"""Control tokens typed in a text are text, whatever kind of piece they are; BOS by default."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from megatron_curr.data.special_tokens import typed
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError

LETTERS = "abcdefgh</>s|n_oxt[]EP"


def added(number: int, content: str, **flags: bool) -> dict[str, Any]:
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": number, "content": content, **dict.fromkeys(names, False), **flags}


def write_json(folder: Path, model: dict[str, Any], **parts: Any) -> Path:
    nothing = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    content = {"version": "1.0", "added_tokens": [], **dict.fromkeys(nothing), "model": model}
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({**content, **parts}))
    return folder


def unigram(folder: Path) -> Path:
    """`</s>` is a piece that the model itself finds in a text."""
    vocab = [["<unk>", 0.0], ["</s>", 0.0], *([letter, -3.0] for letter in f"▁{LETTERS}")]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    special = [added(0, "<unk>", special=True), added(1, "</s>", special=True)]
    return write_json(folder, model, added_tokens=special, pre_tokenizer=space)


def word_level(folder: Path) -> Path:
    words = ["[UNK]", "</s>", "[SEP]", *"abcdefgh", "</", "s>"]
    model = {
        "type": "WordLevel",
        "unk_token": "[UNK]",
        "vocab": {w: n for n, w in enumerate(words)},
    }
    (folder / "tokenizer_config.json").write_text('{"eos_token": "</s>", "sep_token": "[SEP]"}')
    special = [added(0, "[UNK]", special=True), added(2, "[SEP]")]  # a role, but not the kind
    return write_json(folder, model, added_tokens=special, pre_tokenizer={"type": "Whitespace"})


def byte_level(folder: Path, **model: Any) -> Path:
    """`</s>` can be merged from its letters, and taken whole; `<think>` is a word of its own."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "</", "</s", "</s>", "</s>a"]
    merges = [["<", "/"], ["</", "s"], ["</s", ">"], ["</s>", "a"]]
    end = len(alphabet) + 2
    tokens = [added(end, "</s>"), added(end + 2, "<think>"), added(end + 3, "<|x|>", special=True)]
    split = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "use_regex": False,
        "trim_offsets": True,
    }
    content = {"type": "BPE", "vocab": {p: n for n, p in enumerate(pieces)}, "merges": merges}
    nothing = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    content |= dict.fromkeys(nothing) | {"fuse_unk": False, "byte_fallback": False} | model
    return write_json(folder, content, added_tokens=tokens, pre_tokenizer=split)


def pieces(folder: Path, **settings: Any) -> Path:
    """A SentencePiece model whose end token is a user-defined symbol, as `<think>` is."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(LETTERS)] * 20 + ["</s> <|endoftext|>"] * 20),
        model_prefix=str(folder / "tokenizer"),
        **{
            "model_type": "bpe",
            "vocab_size": 330,
            "byte_fallback": True,
            "eos_id": -1,
            "user_defined_symbols": ["<|endoftext|>", "<think>"],
            "control_symbols": ["☃"],
            "hard_vocab_limit": False,
            "minloglevel": 2,
            **settings,
        },
    )
    return folder / "tokenizer.model"


def ranks(folder: Path) -> Path:
    lines = [base64.b64encode(bytes([byte])) + f" {byte}".encode() for byte in range(256)]
    (folder / "small.tiktoken").write_bytes(b"\n".join(lines))
    special = {"<|begin_of_text|>": 300, "<|endoftext|>": 301}
    facts = {"pattern": r"\s+|\S+", "special_tokens": special, "bos_token": "<|begin_of_text|>"}
    (folder / "small.json").write_text(json.dumps(facts))
    return folder / "small.tiktoken"


KINDS: dict[str, Callable[[Path], Path]] = {
    "unigram": unigram,
    "word level": word_level,
    "byte level": byte_level,
    "taken whole": lambda folder: byte_level(folder, ignore_merges=True),
    "sentencepiece bpe": pieces,
    "sentencepiece unigram": lambda folder: pieces(folder, model_type="unigram", vocab_size=290),
    "tiktoken": ranks,
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_control_id_comes_of_typed_text(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(KINDS[kind](tmp_path))
    control = set(tokenizer.special_tokens.values()) - {tokenizer.unknown_id}
    assert tokenizer.eod_id in control
    for text in typed(tokenizer.special_tokens):
        assert control.isdisjoint(tokenizer.encode(text)), text
    for token in tokenizer.special_tokens:  # asked for, it is the token
        ids = tokenizer.encode_batch([f"a{token}b"], allow_special=True)[0]
        if tokenizer.special_tokens[token] != tokenizer.unknown_id and kind != "word level":
            assert tokenizer.special_tokens[token] in ids, token


def test_words_of_the_text_itself_stay_their_tokens(tmp_path: Path) -> None:
    for folder, make in ((tmp_path / "a", byte_level), (tmp_path / "b", pieces)):
        folder.mkdir()
        tokenizer = load_tokenizer(make(folder))
        assert "<think>" not in tokenizer.special_tokens
        own: Callable[[str], list[int]]
        if make is byte_level:
            own = lambda text: tokenizers.Tokenizer.from_file(str(tokenizer.path)).encode(text).ids  # noqa: E731, B023
        else:
            own = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path)).encode
        assert tokenizer.encode("ab<think> a") == own("ab<think> a")
        assert len(tokenizer.encode("<think>")) <= 2


def test_other_ids_stay_as_the_library_gives_them(tmp_path: Path) -> None:
    """A token under another name changes nothing but what is made of that token."""
    for kind in ("unigram", "byte level", "sentencepiece bpe"):
        folder = tmp_path / kind
        folder.mkdir()
        tokenizer = load_tokenizer(KINDS[kind](folder))
        for text in ("abc def", "a</b>", " <t> ", "x|x"):
            allowed = tokenizer.encode_batch([text], allow_special=True)[0]
            assert tokenizer.encode(text) == allowed, (kind, text)


def test_dropout_is_off(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path, dropout=0.5))
    for mode in (False, True):
        found = tokenizer.encode_batch(["</ </s </ </s"] * 50, allow_special=mode)
        assert found == found[:1] * 50


def template(folder: Path, single: str) -> Tokenizer:
    byte_level(folder)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [("<|x|>", made.token_to_id("<|x|>")), ("</s>", made.token_to_id("</s>"))]
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=single, special_tokens=tokens
    )
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.mark.parametrize(
    ("single", "expected"),
    [("<|x|> $A", 1), ("<|x|> $A </s>", 1), ("$A </s>", 0), ("$A", 0), ("<|x|> <|x|> $A", 2)],
)
def test_what_a_post_processor_sets_before_a_text_is_the_default(
    tmp_path: Path, single: str, expected: int
) -> None:
    tokenizer = template(tmp_path, single)
    bos_id = tokenizer.special_tokens["<|x|>"]
    assert tokenizer.bos_ids("auto") == (bos_id,) * expected
    assert tokenizer.bos_ids("no") == ()
    if not expected:
        with pytest.raises(DataError, match=r"names no BOS; name one as bos_token in .*config"):
            tokenizer.bos_ids("yes")
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<|x|>"}}')
        assert load_tokenizer(tmp_path).bos_ids("yes") == (bos_id,)
        assert load_tokenizer(tmp_path).bos_ids("auto") == ()


def test_a_sentencepiece_model_has_the_default_of_the_files_beside_it(tmp_path: Path) -> None:
    path = pieces(tmp_path)
    assert load_tokenizer(path).bos_ids("auto") == ()
    assert load_tokenizer(path).bos_ids("yes") == (1,)
    config = tmp_path / "tokenizer_config.json"
    for content, expected in (
        ({"tokenizer_class": "LlamaTokenizer"}, (1,)),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, ()),
        ({"add_bos_token": True}, (1,)),
        ({"tokenizer_class": "T5Tokenizer"}, ()),
    ):
        config.write_text(json.dumps(content))
        assert load_tokenizer(path).bos_ids("auto") == expected, content


def test_a_rank_file_names_its_bos_beside_it(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(ranks(tmp_path))
    assert tokenizer.bos_ids("auto") == () and tokenizer.bos_ids("yes") == (300,)
