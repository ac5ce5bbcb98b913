"""SentencePiece models convert token for token, or are refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import sentencepiece

from megatron_curr.convert.tokenizer import HARD_TEXTS, check_equal, write_tokenizer
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import DataError
from tests.convert.saved_runs import TEXT, write_corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_corpus(folder)
    return folder / "tokenizer.model"


def test_random_text_encodes_alike(model: Path, tmp_path: Path) -> None:
    chance = random.Random(5)
    letters = " \n\tabcdefghijklmnop.,:;()[]=#0123456789éï日👍\u2581"
    texts = ["".join(chance.choices(letters, k=chance.randint(1, 200))) for _ in range(500)]
    pieces = [*TEXT.split(), "  ", "    ", "\n\n", "ten", "sor", "row", "rows"]
    texts += ["".join(chance.choices(pieces, k=40)) for _ in range(500)]
    ours = write_tokenizer(model, tmp_path, max_tokens=64, texts=texts)
    assert ours.vocab_size == 300


def test_transformers_loads_and_round_trips(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = write_tokenizer(model, tmp_path, max_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_token_id == ours.eod_id
    assert tokenizer.model_max_length == 64
    for text in HARD_TEXTS:
        ids = tokenizer(text, add_special_tokens=True, split_special_tokens=True).input_ids
        assert ids == ours.encode(text)
    assert tokenizer.decode(ours.encode(TEXT)) == TEXT
    assert tokenizer("</s>").input_ids == [ours.eod_id]


def test_a_difference_is_quoted(model: Path, tmp_path: Path) -> None:
    ours = write_tokenizer(model, tmp_path, max_tokens=64)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = document["model"]["merges"][10:]
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="other ids for 'a tensor has rows"):
        check_equal(ours, path, ["a tensor has rows"])


def test_a_unigram_model_is_refused(tmp_path: Path) -> None:
    lines = tmp_path / "text.txt"
    lines.write_text("\n".join(TEXT + str(number) for number in range(500)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines),
        model_prefix=str(tmp_path / "unigram"),
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    target = tmp_path / "hf"
    target.mkdir()
    with pytest.raises(DataError, match="only SentencePiece BPE"):
        write_tokenizer(tmp_path / "unigram.model", target, max_tokens=64)


def test_a_hugging_face_tokenizer_is_copied(model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    write_tokenizer(model, first, max_tokens=64)
    assert load_tokenizer(first / "tokenizer.json").eod_id == 2
    write_tokenizer(first / "tokenizer.json", second, max_tokens=128)
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert json.loads((second / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
