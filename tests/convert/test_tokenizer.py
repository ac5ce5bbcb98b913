"""A run's tokenizer is published so that it reads what training read, or says what it changed."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from megatron_curr.convert.tokenizer import (
    HARD_TEXTS,
    Published,
    check_equal,
    write_tokenizer,
)
from megatron_curr.convert.tokenizer_json import NotExact
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from tests.convert.saved_runs import TEXT, write_corpus

LINES = [f"{TEXT}{number} rivers <think> of stone" for number in range(300)]
BOS, EOS, PAD = "<|begin|>", "<|endoftext|>", "<|pad|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_corpus(folder)
    return folder / "tokenizer.model"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    return folder


def trained(folder: Path, **options: Any) -> Path:
    """A SentencePiece model as these options make it."""
    usual = {
        **{"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"remove_extra_whitespaces": False, "hard_vocab_limit": False, "num_threads": 1},
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_prefix=str(folder / "trained"),
        vocab_size=330,
        minloglevel=2,
        **{**usual, **options},
    )
    return folder / "trained.model"


def byte_level(folder: Path, **config: Any) -> Path:
    """A Hugging Face folder: byte-level BPE with special and other added tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[EOS, BOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(LINES, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "model_max_length": 64}
    settings = {**named, "clean_up_tokenization_spaces": False, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder


def change(folder: Path, edit: Callable[[Backend], object]) -> None:
    path = str(folder / "tokenizer.json")
    backend = Backend.from_file(path)
    edit(backend)
    backend.save(path)


def surrounded(backend: Backend, single: str) -> None:
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=single, pair=f"{single} $B:1", special_tokens=ids),
        ]
    )


def loaded(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def random_texts(tokenizer: Tokenizer, symbols: tuple[str, ...] = ()) -> list[str]:
    chance = random.Random(5)
    letters = [*" \n\tabcdefghijklmnop.,:;()[]=#0123456789éï日👍▁<>|_", "  ", *symbols, *symbols]
    pieces = [tokenizer.decode([token]) for token in range(tokenizer.vocab_size)]
    texts = ["".join(chance.choices(letters, k=chance.randint(1, 60))) for _ in range(500)]
    for _ in range(500):
        texts.append("".join(chance.choices([*pieces, *symbols], k=chance.randint(1, 20))))
    return [*texts, *(f"{symbol}<s>{symbol}" for symbol in symbols), *symbols]


def read_alike(source: Path, folder: Path, texts: list[str]) -> None:
    """The folder's tokenizer, as transformers loads it, against the library of the source."""
    ours, tokenizer = load_tokenizer(source), loaded(folder)
    found = tokenizer(texts, split_special_tokens=True)["input_ids"]
    assert found == ours.encode_batch(texts)


SYMBOLS = ("<|im_start|>", "<think>", "<|im_start|>user", "▁▁", "x")


@pytest.mark.parametrize(
    ("options", "symbols"),
    [
        ({}, ()),
        ({"user_defined_symbols": [*SYMBOLS], "control_symbols": ["<ctl>"]}, SYMBOLS),
        ({"user_defined_symbols": ["\n\n", *SYMBOLS], "add_dummy_prefix": False}, SYMBOLS),
        ({"byte_fallback": False, "user_defined_symbols": ["<think>"]}, ("<think>",)),
        ({"treat_whitespace_as_suffix": True, "user_defined_symbols": ["<think>"]}, ("<think>",)),
        ({"remove_extra_whitespaces": True, "user_defined_symbols": ["<think>"]}, ("<think>",)),
        ({"remove_extra_whitespaces": True, "add_dummy_prefix": False, "pad_id": 3}, ()),
    ],
)
def test_sentencepiece_bpe_of_every_kind_reads_alike(
    tmp_path: Path, target: Path, options: dict[str, Any], symbols: tuple[str, ...]
) -> None:
    source = trained(tmp_path, **options)
    done = write_tokenizer(source, target, max_tokens=64)
    assert done.loader == "AutoTokenizer" and done.notes == ()
    texts = [*HARD_TEXTS, *random_texts(load_tokenizer(source), symbols)]
    read_alike(source, target, texts)
    check_equal(load_tokenizer(source), target / "tokenizer.json", texts)
    assert (target / "tokenizer.model").read_bytes() == source.read_bytes()
    assert loaded(target).pad_token == ("<pad>" if "pad_id" in options else None)


def test_transformers_names_and_round_trips(model: Path, target: Path) -> None:
    ours, done = load_tokenizer(model), write_tokenizer(model, target, max_tokens=64)
    tokenizer = loaded(target)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert done.token_ids == {"bos_token_id": 1, "eos_token_id": 2}
    assert tokenizer.model_max_length == 64
    assert tokenizer.decode(ours.encode(TEXT)) == TEXT
    assert tokenizer("</s>").input_ids == [ours.eod_id]  # which is why the card speaks of it


def test_a_difference_is_quoted(model: Path, target: Path) -> None:
    write_tokenizer(model, target, max_tokens=64)
    path = target / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = document["model"]["merges"][10:]
    path.write_text(json.dumps(document))
    with pytest.raises(NotExact, match="other ids for 'a tensor has rows"):
        check_equal(load_tokenizer(model), path, ["a tensor has rows"])


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "control_symbols": ["<ctl>"]}, "it is a unigram model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text (nmt_nfkc, not identity)"),
        ({"model_type": "char"}, "it is a char model"),
    ],
)
def test_what_has_no_exact_json_is_asked_of_sentencepiece(
    tmp_path: Path, target: Path, options: dict[str, Any], reason: str
) -> None:
    source = trained(tmp_path, **options)
    done = write_tokenizer(source, target, max_tokens=64, begins_with=[1])
    assert reason in done.notes[0] and "goes along as it is" in done.notes[0]
    assert done.loader == "AutoTokenizer"
    assert not (target / "tokenizer.json").exists()
    assert (target / "tokenizer.model").read_bytes() == source.read_bytes()
    read_alike(source, target, [*HARD_TEXTS, *LINES[:20]])
    assert done.begins_with == ("<s>",)
    assert "training read '<s>' there: put it before a text yourself" in done.notes[-1]
    assert loaded(target).model_max_length == 64
    assert len(loaded(target)) == load_tokenizer(source).vocab_size  # nothing was added to it
    assert loaded(target)("a</s>").input_ids[-1] == 2


def test_a_hugging_face_folder_goes_there_and_back_to_the_byte(
    tmp_path: Path, target: Path
) -> None:
    template = [{"name": "default", "template": "{{ messages }}"}]
    source = byte_level(tmp_path / "source", pad_token=PAD, chat_template=template)
    change(source, lambda backend: backend.add_tokens([AddedToken("<tool>", lstrip=True)]))
    (source / "chat_template.jinja").write_text("{{ messages[0] }}")
    (source / "NOTICE").write_text("built with\n")
    (source / "README.md").write_text("of another model\n")
    done = write_tokenizer(source, target, max_tokens=64)
    assert done == Published(
        {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 2},
        "AutoTokenizer",
        EOS,
        None,
        (),
        True,
        (),
    )
    for name in {path.name for path in source.iterdir()} - {"README.md"}:
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    assert not (target / "README.md").exists()
    read_alike(source, target, [*HARD_TEXTS, "a <tool> b", f"x{PAD} {BOS}"])


@pytest.mark.parametrize(
    ("single", "before"),
    [(f"{BOS} $A", [BOS]), (f"{BOS} $A {EOS}", [BOS]), (f"$A {EOS}", []), ("$A", [])],
)
@pytest.mark.parametrize("begins_with", [None, BOS])
def test_bos_is_put_where_training_read_it(
    tmp_path: Path, target: Path, single: str, before: list[str], begins_with: str | None
) -> None:
    source = byte_level(tmp_path / "source", bos_token=BOS, add_bos_token=True)
    change(source, lambda backend: surrounded(backend, single))
    ours = load_tokenizer(source)
    bos = [] if begins_with is None else [ours.special_tokens[begins_with]]
    done = write_tokenizer(source, target, max_tokens=64, begins_with=bos)
    assert loaded(target)("a river").input_ids == [*bos, *ours.encode("a river")]
    raw = Backend.from_file(str(target / "tokenizer.json"))
    assert raw.encode("a river").ids == loaded(target)("a river").input_ids
    assert loaded(target).bos_token == BOS and done.token_ids["bos_token_id"] == 1
    is_same = (single, begins_with) in ((f"{BOS} $A", BOS), ("$A", None))
    told = [note for note in done.notes if "its post-processor puts" in note]
    assert bool(told) != is_same
    assert (
        (source / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    ) == is_same


def test_what_training_did_not_read_is_taken_out_and_told(tmp_path: Path, target: Path) -> None:
    source = byte_level(
        tmp_path / "source",
        tokenizer_class="LlamaTokenizerFast",
        pad_token="[PAD]",
        additional_special_tokens=[BOS, "<tool>"],
        added_tokens_decoder={"329": {"content": "<tool>", "special": True}},
        auto_map={"AutoTokenizer": ["tokenization_own.Own", None]},
    )
    (source / "tokenization_own.py").write_text("raise SystemExit\n")
    change(source, lambda backend: backend.enable_truncation(4))
    done = write_tokenizer(source, target, max_tokens=64)
    for told in (
        *("truncation of every text", "pad_token '[PAD]' is not in the"),
        *(
            "additional_special_tokens '<tool>': not in",
            "tokenizer_class LlamaTokenizerFast became",
        ),
        *("added_tokens_decoder is not tokenizer.json's", "left behind in"),
    ):
        assert any(told in note for note in done.notes), told
    tokenizer = loaded(target)
    assert len(tokenizer) == 330 and tokenizer.pad_token is None
    assert (
        tokenizer("a river of stone " * 9).input_ids
        == Backend.from_file(str(target / "tokenizer.json")).encode("a river of stone " * 9).ids
    )
    assert len(tokenizer("a river of stone " * 9).input_ids) > 4


def test_a_class_that_transformers_forces_on_a_model_is_told(model: Path, target: Path) -> None:
    (target / "config.json").write_text('{"model_type": "qwen2"}')
    done = write_tokenizer(model, target, max_tokens=64)
    if done.loader != "AutoTokenizer":  # version 5 takes its own for this model type, 4 does not
        assert done.loader == "PreTrainedTokenizerFast"
        assert "takes Qwen2Tokenizer, which gives other ids" in done.notes[-1]


def test_tiktoken_ranks_become_a_json(tmp_path: Path, target: Path) -> None:
    ranks = [bytes([byte]) for byte in range(256)]
    ranks += [
        b"th",
        b"the",
        b" the",
        b"in",
        b"ing",
        b"  ",
        b"    ",
        b"aa",
        b"aaaa",
        "é".encode(),
        b"12",
    ]
    source = tmp_path / "own.tiktoken"
    source.write_bytes(
        b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    )
    pattern = r"'(?i:[sdmt]|ll)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++|\s++"
    facts = {"pattern": pattern, "special_tokens": {EOS: 300, BOS: 305}}
    source.with_suffix(".json").write_text(json.dumps(facts))
    done = write_tokenizer(source, target, max_tokens=64)
    assert done.notes == () and done.loader == "AutoTokenizer"
    assert done.token_ids == {"bos_token_id": None, "eos_token_id": 300}
    read_alike(source, target, [*HARD_TEXTS, "the 12345 things", *LINES[:20], f"a{BOS}"])
    assert (target / "own.tiktoken").read_bytes() == source.read_bytes()
    assert loaded(target)(f"a{BOS}").input_ids == [97, 305]
