"""Text that a tokenizer does not know is counted, told, and limited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers

from data_tools.preprocess_text import Options, RunSettings, Summary, preprocess
from megatron_curr.cli import main
from megatron_curr.data.shards import open_shards
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, small_tokenizer, write_jsonl

RUSSIAN = "Лёгкий снег над рекой"


def pieces(folder: Path) -> Path:
    """SentencePiece without byte fallback: a run of unknown letters is one unknown token."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(folder / "m"),
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "m.model"


def words(folder: Path) -> Path:
    """Whole words: the letters of an unknown word are known."""
    model = {"[UNK]": 0, "</s>": 1, "b": 2, "d": 3, "bd": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(model, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(folder / "tokenizer.json"))
    return folder


def letters(folder: Path, **model: object) -> Path:
    """A BPE with neither an unknown token nor all bytes: what it does not know leaves no trace."""
    vocabulary = {piece: number for number, piece in enumerate(["</s>", *"Documentcsr "])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], **model))
    made.save(str(folder / "tokenizer.json"))
    return folder


def shards_of(
    folder: Path, tokenizer: Path, texts: list[str], *, limit: float = 1, bos: str = "no"
) -> Summary:
    return preprocess(
        [write_jsonl(folder / "c.jsonl", texts)],
        folder / "out",
        tokenizer=tokenizer,
        options=Options(heldout_frac=0, bos=bos),
        settings=RunSettings(max_unknown_frac=limit),
        show_progress=False,
    )


def test_the_share_of_unknown_tokens_is_told_and_limited(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = pieces(tmp_path)
    unknown_id = load_tokenizer(tokenizer).unknown_id
    texts = [*TEXTS, RUSSIAN]
    with pytest.raises(DataError, match=r"are unknown.*--max-unknown 0\.0005.*byte fallback"):
        shards_of(tmp_path, tokenizer, texts, limit=0.0005)
    assert not (tmp_path / "out").exists()
    summary = shards_of(tmp_path, tokenizer, texts, limit=0.01)
    shards = open_shards(tmp_path / "out" / "train")
    ids = shards.read(0, shards.num_tokens)
    lost = summary.unknown
    assert lost.tokens == int((ids == unknown_id).sum()) == 4
    assert lost.of_tokens == len(ids) - len(texts)
    assert (lost.characters, lost.of_characters) == (18, sum(map(len, texts)))
    assert "4 of" in summary.text() and "18 of" in summary.text()
    assert json.loads(summary.json())["unknown"]["tokens"] == 4
    assert main(["inspect", str(tmp_path / "out" / "train")]) == 0
    assert "text lost: 4 of" in capsys.readouterr().out


def test_a_long_run_of_unknown_letters_weighs_by_its_letters(tmp_path: Path) -> None:
    texts = [*TEXTS, "снег" * 2_000]
    with pytest.raises(DataError, match="8,000 of"):
        shards_of(tmp_path, pieces(tmp_path), texts, limit=0.01)


def test_unknown_words_of_known_letters_count_as_tokens(tmp_path: Path) -> None:
    summary = shards_of(tmp_path, words(tmp_path), ["b d bd db"] * 4)
    assert (summary.unknown.tokens, summary.unknown.of_tokens) == (4, 16)
    assert summary.unknown.characters == 0 and summary.unknown.share == 0.25


def test_letters_that_vanish_without_a_token_count(tmp_path: Path) -> None:
    summary = shards_of(tmp_path, letters(tmp_path), ["Document", "Doc й"])
    assert (summary.unknown.tokens, summary.unknown.characters) == (0, 1)
    assert summary.unknown.of_characters == 13


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_a_tokenizer_with_all_bytes_loses_nothing(tmp_path: Path, kind: str) -> None:
    tokenizer = small_tokenizer(kind)
    assert tokenizer.lossless and tokenizer.knows("Л")
    summary = shards_of(tmp_path, tokenizer.path, [RUSSIAN], limit=0)
    assert summary.unknown.tokens == summary.unknown.characters == 0
    assert "lost" not in summary.text()
