"""What a SentencePiece model cannot become is known before anything is trained with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from megatron_curr.data.sentencepiece_model import publishing_warning, why_not_fast
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.preflight import prepare
from tests.training.tiny import recipe_values, write_corpus, write_recipe


def reason(folder: Path, **options: Any) -> str | None:
    lines = (f"a river of stone, number {number}" for number in range(300))
    usual = {"model_type": "bpe", "normalization_rule_name": "identity", "byte_fallback": True}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_prefix=str(folder / "own"),
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**usual, **options},
    )
    return why_not_fast(load_tokenizer(folder / "own.model"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, None),
        ({"byte_fallback": False, "user_defined_symbols": ["<think>"]}, None),
        ({"add_dummy_prefix": False, "remove_extra_whitespaces": True}, None),
        ({"model_type": "unigram"}, "it is a unigram model, not BPE"),
        ({"model_type": "word", "byte_fallback": False}, "it is a word model, not BPE"),
        ({"normalization_rule_name": "nfkc_cf"}, "it normalises text (nfkc_cf, not identity)"),
    ],
)
def test_what_keeps_a_model_from_being_fast_is_told(
    tmp_path: Path, options: dict[str, Any], told: str | None
) -> None:
    assert reason(tmp_path, **options) == told


def test_training_and_preprocessing_warn_before_they_begin(tmp_path: Path) -> None:
    write_corpus(tmp_path)  # its tokenizer is a unigram model
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(tmp_path, tmp_path / "run"))
    (warning,) = prepare(load_recipe(recipe), 1).warnings
    tokenizer = tmp_path / "tokenizer.model"
    assert warning == publishing_warning(load_tokenizer(tokenizer))
    assert warning.startswith(f"warning: {tokenizer}: it is a unigram model, not BPE, so an export")
    assert warning.endswith("as `megatron-curr train-tokenizer` does")
