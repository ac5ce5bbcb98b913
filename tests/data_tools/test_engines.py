"""Fast engines: exact, or not used."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import engine_choice
from data_tools.engine_choice import choose_engine
from data_tools.engines import EVERY_TEXT, FastokensEngine, GigatokenEngine, load_engine
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, run, small_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiktoken file: all bytes, and a few words of two to eight bytes."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [b"co", b"un", b"coun", b"ts", b" t", b" to", b"Do", b"cu", b"Docu"]
    pieces = [bytes([byte]) for byte in range(256)] + words
    lines = [base64.b64encode(piece) + f" {rank}".encode() for rank, piece in enumerate(pieces)]
    (folder / "small.tiktoken").write_bytes(b"\n".join(lines))
    facts = {
        "pattern": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "special_tokens": {"<|endoftext|>": 300},
    }
    (folder / "small.json").write_text(json.dumps(facts))
    return load_tokenizer(folder / "small.tiktoken")


def tokenizer_of(kind: str, ranks: Tokenizer) -> Tokenizer:
    return ranks if kind == "tiktoken" else small_tokenizer(kind)


def rows(flat) -> list[list[int]]:
    ids, lengths = flat
    return [row.tolist() for row in np.split(ids, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize(
    ("kind", "engine"),
    [
        ("bpe", "fastokens"),
        ("bpe", "gigatoken"),
        ("sentencepiece", "gigatoken"),
        ("tiktoken", "fastokens"),
    ],
)
def test_fast_engines_equal_the_reference_on_any_text(
    kind: str, engine: str, ranks: Tokenizer
) -> None:
    tokenizer = tokenizer_of(kind, ranks)
    special = st.sampled_from([*tokenizer.special_tokens, "\u2581", "  ", "\r\n", "e\u0301"])
    text = st.lists(st.text(st.characters(exclude_categories=["Cs"])) | special).map("".join)
    fast = {
        mode: load_engine(tokenizer, engine, special_tokens=mode, routes=EVERY_TEXT)
        for mode in ("text", "allow")
    }

    @given(st.lists(text, min_size=1, max_size=6))
    @settings(max_examples=80)
    def check(texts: list[str]) -> None:
        for mode, found in fast.items():
            truth = tokenizer.encode_batch(texts, allow_special=mode == "allow")
            assert rows(found.encode(texts)) == truth

    check()


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece", "tiktoken"])
def test_the_chosen_engine_says_what_it_rests_on(kind: str, ranks: Tokenizer) -> None:
    tokenizer = tokenizer_of(kind, ranks)
    engine, verdict = choose_engine(tokenizer, TEXTS[:20])
    assert verdict.engine in ("fastokens", "gigatoken") and verdict.reference == tokenizer.library
    assert verdict.compared_documents > 60
    assert rows(engine.encode(TEXTS[:9])) == tokenizer.encode_batch(TEXTS[:9])
    _, verdict = choose_engine(tokenizer, [], wanted="reference")
    assert verdict.engine == tokenizer.library


class WrongOnOneWord(FastokensEngine):
    """An engine with the kind of bug that a release may bring."""

    def encode(self, texts):
        ids, lengths = super().encode(texts)
        return (np.sort(ids) if any("counts to 7" in text for text in texts) else ids), lengths


def test_an_engine_that_differs_is_passed_over_and_the_manifest_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice, "FAST_ENGINES", (WrongOnOneWord, GigatokenEngine))
    tokenizer = small_tokenizer("bpe")
    _, verdict = choose_engine(tokenizer, TEXTS)
    assert verdict.engine == "gigatoken"
    assert "differs from the reference" in verdict.passed_over["fastokens"]
    monkeypatch.setattr(engine_choice, "FAST_ENGINES", (WrongOnOneWord,))
    with pytest.raises(DataError, match="differs from the reference"):
        choose_engine(tokenizer, TEXTS, wanted="fastokens")
    corpus = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    summary = run([corpus], tmp_path / "a", kind="bpe", engine="auto")
    manifest = json.loads((tmp_path / "a" / "train" / "manifest.json").read_bytes())
    told = manifest["options"]["engine"]
    assert told["engine"] == told["reference"] == "tokenizers"
    assert "differs from the reference" in told["passed_over"]["fastokens"] in summary.engine


def test_special_tokens_are_text_or_tokens_or_an_error(tmp_path: Path) -> None:
    corpus = write_jsonl(tmp_path / "a.jsonl", ["one", "two <|endoftext|> three", "four"])
    counts = {}
    for mode in ("text", "allow"):
        output = tmp_path / mode
        run([corpus], output, kind="bpe", engine="auto", heldout_frac=0, special_tokens=mode)
        content = np.fromfile(output / "train" / f"{mode}_train_00000.bin", np.uint16)
        counts[mode] = int((content == small_tokenizer("bpe").eod_id).sum())
    assert counts == {"text": 3, "allow": 4}
    with pytest.raises(DataError, match=r"a\.jsonl: row 2 .* '<\|endoftext\|>'"):
        run([corpus], tmp_path / "e", kind="bpe", engine="auto", special_tokens="error")


def test_a_rank_file_needs_its_pattern(tmp_path: Path, ranks: Tokenizer) -> None:
    assert ranks.eod_id == 300 and ranks.vocab_size == 301
    assert ranks.decode([*ranks.encode("Document counts"), 300]) == "Document counts"
    (tmp_path / "other.tiktoken").write_bytes(ranks.path.read_bytes())
    with pytest.raises(DataError, match="has no split pattern, and 'other' is none of r50k_base"):
        load_tokenizer(tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match='needs "pattern"'):
        load_tokenizer(tmp_path)
    (tmp_path / "other.json").write_text('{"pattern": "a", "special_tokens": {}}')
    with pytest.raises(DataError, match="no end token"):
        load_tokenizer(tmp_path)
