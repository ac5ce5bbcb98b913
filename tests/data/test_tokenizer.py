"""Tokenizers: text comes back, and special tokens typed in a text stay text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.train_tokenizer import train_tokenizer
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError

TEXT = "def add(left, right):\n    return left + right  # 12 + 30 is 42\n"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "a.jsonl").write_text(json.dumps({"text": TEXT * 5}))
    return train_tokenizer([folder / "a.jsonl"], folder / "tokenizer.model", vocab_size=300)


@pytest.fixture(scope="module")
def bytes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with an end token and a start token that its template would add."""
    folder = tmp_path_factory.mktemp("byte_level")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT] * 5, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", 0)]
    )
    made.save(str(folder / "tokenizer.json"))
    return folder


@given(st.text(st.characters(exclude_characters="\u2581", exclude_categories=["Cs"])))
@settings(max_examples=200)
def test_sentencepiece_gives_any_text_back(pieces: Tokenizer, text: str) -> None:
    assert pieces.decode(pieces.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100)
def test_byte_level_gives_any_text_back(bytes_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(bytes_folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_in_a_text_are_text(pieces: Tokenizer, bytes_folder: Path) -> None:
    byte_level = load_tokenizer(bytes_folder)
    for tokenizer, text in (
        (pieces, "a</s>b<s><unk>"),
        (byte_level, "a<|endoftext|>b<|start|>"),
    ):
        ids = tokenizer.encode(text)
        assert tokenizer.eod_id not in ids and 0 not in ids
        assert tokenizer.decode(ids) == text


def test_facts_of_a_tokenizer(pieces: Tokenizer, bytes_folder: Path) -> None:
    byte_level = load_tokenizer(bytes_folder)
    assert (pieces.vocab_size, pieces.eod_id, pieces.name) == (300, 2, "tokenizer")
    assert byte_level.vocab_size > 258 and byte_level.eod_id == 1
    assert byte_level.name == bytes_folder.name
    assert load_tokenizer(pieces.path.parent).sha256 == pieces.sha256 != byte_level.sha256
    texts = [TEXT, "", "x"]
    assert pieces.encode_batch(texts, num_threads=2) == [pieces.encode(text) for text in texts]
    assert pieces.decode([pieces.eod_id]) == ""


def test_the_end_token_is_the_configs(bytes_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((bytes_folder / "tokenizer.json").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    for eos_token in ("<|start|>", {"content": "<|start|>"}):
        config.write_text(json.dumps({"eos_token": eos_token}))
        assert load_tokenizer(tmp_path).eod_id == 0
    config.write_text(json.dumps({"eos_token": "<|nope|>"}))
    with pytest.raises(DataError, match=r"no end token \(looked for <\|nope\|>\)"):
        load_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such tokenizer"):
        load_tokenizer(tmp_path / "missing.model")
    with pytest.raises(DataError, match="neither tokenizer"):
        load_tokenizer(tmp_path)
    for name, message in (("a.model", "not a SentencePiece"), ("b.json", "not a Hugging Face")):
        (tmp_path / name).write_text("{}")
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / name)
