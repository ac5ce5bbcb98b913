"""What fast engines must not see: code points and added tokens on which they differ."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools import engine_proof
from data_tools.engine_proof import Proof, prove
from data_tools.engines import (
    EVERY_TEXT,
    FAST_ENGINES,
    FastKind,
    GigatokenEngine,
    ReferenceEngine,
    Routes,
    guarded,
    load_engine,
)
from megatron_curr.data.special_tokens import typed
from megatron_curr.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from tests.data_tools.text_corpora import small_tokenizer

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def edited(
    folder: Path, *, pattern: str = "", normalizer: object = None, **added: dict
) -> Tokenizer:
    """The small byte-level tokenizer with another split and more added tokens."""
    content = json.loads(small_tokenizer("bpe").path.read_bytes())
    if pattern:
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
        steps = [{**split, "invert": False}, {**level, "use_regex": False}]
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    content["normalizer"] = normalizer
    size = len(content["model"]["vocab"])
    for number, (token, flags) in enumerate(added.items(), start=size):
        plain = dict.fromkeys((*FLAGS, "special"), False)
        content["added_tokens"].append({"id": number, "content": token, **plain, **flags})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(folder)


def rows(flat) -> list[list[int]]:
    return [row.tolist() for row in np.split(flat[0], np.cumsum(flat[1])[:-1])]


@pytest.fixture(scope="module")
def proven(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Proof]:
    """gigatoken beside a split like that of Llama 3."""
    tokenizer = edited(tmp_path_factory.mktemp("llama"), pattern=LLAMA3)
    return tokenizer, prove(GigatokenEngine, tokenizer)


def test_texts_with_code_points_of_another_unicode_get_the_ids_of_the_reference(
    proven: tuple[Tokenizer, Proof],
) -> None:
    tokenizer, proof = proven
    assert proof.refusal is None
    ranges = proof.routes.code_points
    for code_point in (0xA7CF, 0x16EBB, 0x323B0):  # letters since Unicode 16 and 17
        assert any(first <= code_point <= last for first, last in ranges), hex(code_point)
    assert 1_000 < proof.routes.num_code_points < 10_000
    differing = st.sampled_from(ranges).flatmap(lambda r: st.integers(*r)).map(chr)
    others = st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
    text = st.lists(differing | others | st.sampled_from(['",\n', "a", "1", "  ", "'s"]))
    engine = load_engine(tokenizer, "gigatoken", special_tokens="text", routes=proof.routes)

    @given(st.lists(text.map("".join), min_size=1, max_size=5))
    @settings(max_examples=150)
    def check(texts: list[str]) -> None:
        assert rows(engine.encode(texts)) == tokenizer.encode_batch(texts)

    check()


def test_other_texts_stay_with_the_engine(proven: tuple[Tokenizer, Proof]) -> None:
    tokenizer, proof = proven
    engine = load_engine(tokenizer, "gigatoken", special_tokens="text", routes=proof.routes)
    texts = ["plain", "naïve 中文 👩", "a\ua7cfb"]
    assert engine._guarded(texts) == [2]


def test_a_proof_is_kept_and_made_again_where_it_is_damaged(
    proven: tuple[Tokenizer, Proof], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, proof = proven
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []
    monkeypatch.setattr(engine_proof, "_prove", lambda *a: made.append(a) or proof)
    assert prove(GigatokenEngine, tokenizer) == prove(GigatokenEngine, tokenizer) == proof
    assert len(made) == 1
    (kept,) = (tmp_path / "megatron-curr" / "engines").iterdir()
    kept.write_text(kept.read_text()[:40])
    assert prove(GigatokenEngine, tokenizer) == proof and len(made) == 2
    assert json.loads(kept.read_bytes())["refusal"] is None
    monkeypatch.setattr(engine_proof, "version", lambda package: "another")
    assert prove(GigatokenEngine, tokenizer) == proof and len(made) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")  # cannot be written
    assert prove(GigatokenEngine, tokenizer) == proof and len(made) == 4


@pytest.mark.parametrize("kind", FAST_ENGINES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("flag", ["", *FLAGS, "special"])
def test_added_tokens_with_any_flag_are_those_of_the_reference(
    tmp_path: Path, kind: FastKind, flag: str
) -> None:
    flags = {flag: True} if flag else {}
    tokenizer = edited(tmp_path, NaCl=flags, Na=flags, **{"Cl Na": flags, "<think>": flags})
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    hidden = engine_proof._hidden(kind, tokenizer)
    assert isinstance(hidden, tuple), hidden
    if flag in ("single_word", "lstrip", "rstrip"):
        assert set(hidden) == set(tokenizer.added_tokens)
    engine = guarded(kind(tokenizer, hidden), tokenizer, "text", Routes(hidden=hidden))
    texts = typed([*tokenizer.added_tokens, *tokenizer.special_tokens])
    texts += ["NaCl and NaClO and CNaCl. NaCl", "x Cl NaCl Na", "\tNa\n", "Na_Na-Na<think>NaCl"]
    assert rows(engine.encode(texts)) == tokenizer.encode_batch(texts)
    parts = st.sampled_from([*tokenizer.added_tokens, " ", "\n", "a", "é", "_", ".", "1"])

    @given(st.lists(st.lists(parts).map("".join), min_size=1, max_size=5))
    @settings(max_examples=60)
    def check(found: list[str]) -> None:
        assert rows(engine.encode(found)) == tokenizer.encode_batch(found)

    check()


def test_a_token_that_a_normalizer_could_make_is_not_hidden(tmp_path: Path) -> None:
    flags = {"single_word": True, "normalized": True}
    tokenizer = edited(tmp_path, normalizer={"type": "NFC"}, **{"é": flags})
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    told = engine_proof._hidden(GigatokenEngine, tokenizer)
    assert told == "may match the added token 'é' otherwise"


class LosesLetters(GigatokenEngine):
    """An engine that takes two letters for another one, and joins two more."""

    def encode(self, texts):
        mixed = [text.replace("q", "k").replace("ß", "k").replace("ŀŁ", "k") for text in texts]
        return super().encode(mixed)


def test_the_code_points_that_differ_are_found_alone_or_with_their_group(tmp_path: Path) -> None:
    tokenizer = edited(tmp_path)
    groups = [list(range(64)), list(range(64, 128)), list(range(128, 192)), list(range(192, 640))]
    reference, engine = ReferenceEngine(tokenizer), LosesLetters(tokenizer)
    apart = engine_proof._narrowed(groups, ("a", "aa", "a"), reference, engine)
    assert list(apart) == [ord("q"), ord("ß")]
    joined = list(engine_proof._narrowed(groups, ("a", "", "a"), reference, engine))
    assert {ord("q"), ord("ß"), 0x140, 0x141} <= set(joined) and len(joined) < 60


def test_without_routes_there_is_no_guard() -> None:
    tokenizer = small_tokenizer("bpe")
    fast = ReferenceEngine(tokenizer)
    assert guarded(fast, tokenizer, "text", EVERY_TEXT) is fast
