"""Training a tokenizer: the same file every time, and a way out where the text is too little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.train_tokenizer import train_tokenizer
from megatron_curr.cli import main
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import DataError


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    texts = [f"    value_{number} = {number * 7}\n\treturn it\n" for number in range(300)]
    path = tmp_path / "code.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_same_corpus_gives_the_same_file(tmp_path: Path, corpus: Path) -> None:
    one = train_tokenizer([corpus], tmp_path / "a" / "one.model", vocab_size=300)
    two = train_tokenizer([corpus], tmp_path / "b" / "two.model", vocab_size=300)
    assert one.sha256 == two.sha256
    assert one.vocab_size == 300 and one.eod_id == 2


def test_digits_stand_alone_and_spaces_stay(tmp_path: Path, corpus: Path) -> None:
    tokenizer = train_tokenizer([corpus], tmp_path / "one.model", vocab_size=300)
    assert len(tokenizer.encode("1234567")) == 7
    for text in ("  x", "x  ", "\n\n  \tx = 1\r\n", " ", ""):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_too_little_text_and_too_few_pieces_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match="give more text or a smaller --vocab-size"):
        train_tokenizer([corpus], tmp_path / "one.model", vocab_size=30_000)
    with pytest.raises(DataError, match="take 259"):
        train_tokenizer([corpus], tmp_path / "one.model", vocab_size=259)
    assert not (tmp_path / "one.model").exists()


def test_the_verb(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "one.model"
    arguments = ["train-tokenizer", str(corpus), "--output", str(output), "--vocab-size", "300"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(output)
    assert load_tokenizer(output).vocab_size == 300
    assert main(["train-tokenizer", str(tmp_path / "none.jsonl"), *arguments[2:]]) == 2
    assert "no such file or folder" in capsys.readouterr().err
