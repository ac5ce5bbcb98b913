"""Training a tokenizer: the same file every time, and a way out where the text is too little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_tools.train_tokenizer import _sample, train_tokenizer
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


def test_byte_level_bpe_is_the_same_every_time_and_gives_any_text_back(
    tmp_path: Path, corpus: Path
) -> None:
    made = [
        train_tokenizer(
            [corpus], tmp_path / name, kind="bpe", vocab_size=280, special_tokens=["<meta>"]
        )
        for name in ("one", "two")
    ]
    assert made[0].sha256 == made[1].sha256
    assert made[0].special_tokens == {"<|endoftext|>": 0, "<meta>": 1} and made[0].eod_id == 0
    for text in ("  x", "\n\n  \tvalue_1 = 7\r\n", "naïve \u2581 <meta>", "12345", ""):
        assert made[0].decode(made[0].encode(text)) == text
    with pytest.raises(DataError, match="give more text or a smaller --vocab-size"):
        train_tokenizer([corpus], tmp_path / "large", kind="bpe", vocab_size=9_000)
    with pytest.raises(DataError, match="must be one of sentencepiece, bpe"):
        train_tokenizer([corpus], tmp_path / "odd", kind="unigram")


def test_the_sample_is_seeded_and_no_larger_than_asked() -> None:
    texts = [f"text {number}" for number in range(500)]
    sample = _sample(texts, 800, seed=1)
    assert 800 <= sum(map(len, sample)) < 820
    assert sample == _sample(reversed(texts), 800, seed=1) != _sample(texts, 800, seed=2)
    assert _sample(texts, 10**6, seed=1) != texts and len(_sample(texts, 10**6, seed=1)) == 500


def test_too_little_text_and_too_few_pieces_are_refused(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(DataError, match="give more text or a smaller --vocab-size"):
        train_tokenizer([corpus], tmp_path / "one.model", vocab_size=30_000)
    for kind in ("sentencepiece", "bpe"):
        with pytest.raises(DataError, match=r"no text in the field 'body'; name .* --text-field"):
            train_tokenizer(
                [corpus], tmp_path / "one.model", kind=kind, vocab_size=300, text_field="body"
            )
    with pytest.raises(DataError, match="take 259"):
        train_tokenizer([corpus], tmp_path / "one.model", vocab_size=259)
    assert not (tmp_path / "one.model").exists()


def test_the_verb(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "one.model"
    arguments = ["train-tokenizer", str(corpus), "--output", str(output), "--vocab-size", "300"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == f"{output}: 300 ids, EOD 2"
    assert load_tokenizer(output).vocab_size == 300
    assert main(["train-tokenizer", str(tmp_path / "none.jsonl"), *arguments[2:]]) == 2
    assert "no such file or folder" in capsys.readouterr().err
