"""Filters, duplicates, templates, normalisation and what is set before a document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools import dedup
from data_tools.filters import Filter
from megatron_curr.data.shards import open_shards
from megatron_curr.errors import DataError
from tests.data_tools.text_corpora import TEXTS, run, small_tokenizer, write_jsonl


def preprocessed(tmp_path: Path, rows: list[dict[str, Any]], **options: object):
    """(summary, table rows with their ``ids``, manifest options) of some rows, none held out."""
    corpus = tmp_path / "in.jsonl"
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run([corpus], tmp_path / "x", heldout_frac=0, max_rejected_frac=1.0, **options)
    shard = open_shards(tmp_path / "x" / "train").shards[0]
    table = pq.read_table(shard.prefix.with_name(shard.name + ".documents.parquet")).to_pylist()
    for row in table:
        first = row["first_token"]
        row["ids"] = shard.tokens[first : first + row["num_tokens"]].tolist()
    manifest = json.loads((tmp_path / "x" / "train" / "manifest.json").read_bytes())
    return summary, table, manifest["options"]


@pytest.mark.parametrize(
    ("expression", "kept"),
    [
        ("quality > 0.5", True),
        ("quality > 0.5 and domain(url) in ('e.org', 'f.org')", True),
        ("not toxic and 2020 <= int(date) < 2022", True),
        ("len(text) < 3 or startswith(lower(url), 'ftp')", False),
        ("field('a-b') == 1", True),
        ("missing > 1", "no field 'missing' to filter by"),
        ("quality > text", "cannot be filtered (TypeError)"),
        ("quality / zero > 1", "cannot be filtered (ZeroDivisionError)"),
    ],
)
def test_filters(expression: str, kept: bool | str) -> None:
    row = {"text": "long", "quality": 0.7, "url": "http://WWW.e.org:80/x", "toxic": False}
    assert Filter(expression)({**row, "date": "2021", "a-b": 1, "zero": 0}) == kept


def test_the_text_is_in_the_field_that_was_named(tmp_path: Path) -> None:
    rows = [{"body": "this", "text": "not that"}, {"text": "nor that"}]
    summary, table, options = preprocessed(tmp_path, rows, text_field="body")
    assert small_tokenizer().decode(table[0]["ids"]) == "this" and options["text_field"] == "body"
    assert summary.rejects == {"no field 'body'": 1}


NESTED = [
    {"meta": {"text": "nested", "url": "u", "deep": {"er": 2**70}}, "id": 1},
    {"meta.text": "literal", "meta": {"text": "loses", "url": "v"}, "id": 2},
    {"meta.deep": {"er": 3}, "meta": {"text": "both", "deep": {"er": 4}}, "id": 3},
    {"meta": {"text": None}, "id": 4},
    {"meta": None, "id": 5},
    {"meta": "text", "id": 6},
    {"meta": {"text": 7}, "id": 7},
]


def test_fields_inside_of_fields_have_dots_and_a_key_written_so_wins(tmp_path: Path) -> None:
    how = {"text_field": "meta.text", "metadata": ("meta.url", "meta.deep.er"), "filter": "id > 0"}
    summary, table, _ = preprocessed(tmp_path, NESTED, **how)
    decode = small_tokenizer().decode
    assert [(decode(row["ids"]), row["meta.url"], row["meta.deep.er"]) for row in table] == [
        ("nested", "u", str(2**70)),
        ("literal", "v", None),
        ("both", None, "3"),
    ]
    assert summary.rejects == {
        "field 'meta.text' is null": 2,
        "field 'meta.text' is not text": 1,
        "no field 'meta.text'": 1,
    }


def test_structs_of_tables_are_fields_inside_of_fields(tmp_path: Path) -> None:
    rows = pa.array([{"text": text, "n": n} for n, text in enumerate(TEXTS[:8])])
    table = pa.table({"meta": rows, "text": ["not this"] * 8})
    kinds = {
        "plain": table,
        "dictionary": pa.table({"meta.text": pa.array(TEXTS[:8]).dictionary_encode()}),
        "large": pa.table({"meta.text": pa.array(TEXTS[:8], pa.large_string())}),
        "bytes": pa.table({"meta.text": pa.array([text.encode() for text in TEXTS[:8]])}),
    }
    for name, content in kinds.items():
        (tmp_path / name).mkdir()
        pq.write_table(content, tmp_path / name / "a.parquet")
        with pa.ipc.new_file(str(tmp_path / name / "b.arrow"), content.schema) as writer:
            writer.write_table(content)
        for file in ("a.parquet", "b.arrow"):
            output = tmp_path / name / file.partition(".")[0]
            run([tmp_path / name / file], output, heldout_frac=0, text_field="meta.text")
            shards = open_shards(output / "train")
            text = small_tokenizer().decode(shards.read(0, shards.num_tokens).tolist())
            assert text == "".join(TEXTS[:8])
    how = {"heldout_frac": 0, "text_field": "meta.text", "metadata": ("meta",)}
    run([tmp_path / "plain" / "a.parquet"], tmp_path / "whole", **how)
    (found,) = (tmp_path / "whole" / "train").glob("*.documents.parquet")
    assert json.loads(pq.read_table(found)["meta"][3].as_py()) == {"text": TEXTS[3], "n": 3}
    with pytest.raises(DataError, match=r"no column 'meta\.body'; it has meta\.text"):
        run([tmp_path / "large" / "a.parquet"], tmp_path / "y", text_field="meta.body")


def test_numbers_and_letters_that_nothing_can_write_are_mended_or_rejected(tmp_path: Path) -> None:
    rows = [
        {"text": "a \ud83d b", "n": 1, "s": "\udc00"},
        {"text": "fine", "n": 10**400, "s": 10**400},
        {"text": "good", "n": float("nan"), "s": float("inf")},
    ]
    summary, table, options = preprocessed(
        tmp_path, rows, metadata=("n:float", "s"), metadata_prefix=("s",)
    )
    text = small_tokenizer().decode(table[0]["ids"])
    assert text.endswith("a \ufffd b") and table[0]["s"] == "\ufffd"
    assert summary.mended == options["mended_rows"] == 1
    assert "1 with lone surrogates, now U+FFFD" in summary.text()
    assert summary.rejects == {"metadata 'n' is not float": 1} and len(table) == 2


def test_filtered_documents_are_counted_and_bad_ones_rejected(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "quality": 0.9, "age": 3},
        {"text": "two", "quality": 0.1, "age": 3},
        {"text": "three", "age": 4},
        {"text": "four", "quality": 1, "age": "old"},
        {"text": "five", "quality": 1, "age": None},
    ]
    summary, table, options = preprocessed(
        tmp_path, rows, filter="quality > 0.5", metadata=("age:int", "quality:float", "line")
    )
    assert [(row["line"], row["age"], row["quality"]) for row in table] == [
        (1, 3, 0.9),
        (5, None, 1.0),
    ]
    assert all(row["meta_line"] is None for row in table)
    assert summary.filtered == options["filtered_documents"] == 1
    assert summary.rejects == {
        "metadata 'age' is not int": 1,
        "no field 'quality' to filter by": 1,
    }
    assert "1 filtered" in summary.text()


@pytest.mark.parametrize("bucket_documents", [1 << 20, 10])
def test_the_first_of_equal_texts_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_documents: int
) -> None:
    monkeypatch.setattr(dedup, "_BUCKET_DOCUMENTS", bucket_documents)
    texts = [*TEXTS[:60], *TEXTS[20:100], TEXTS[0]]
    corpus = write_jsonl(tmp_path / "a.jsonl", texts)
    for name, unit_bytes in (("a", 1 << 20), ("b", 3_000)):
        output = tmp_path / name
        how = {"shard_tokens": 700, "unit_bytes": unit_bytes, "metadata": ("id:int",)}
        summary = run([corpus], output, deduplicate=True, **how)
        assert summary.duplicates == 41 and sum(summary.documents.values()) == 100
        tables = sorted(output.rglob("*.documents.parquet"))
        ids = [row for table in tables for row in pq.read_table(table)["id"].to_pylist()]
        assert sorted(ids) == [*range(60), *range(100, 140)]
        tokenizer = small_tokenizer()
        for part in ("train", "heldout"):
            shards = open_shards(output / part)
            stored = tokenizer.decode(shards.read(0, shards.num_tokens).tolist())
            rows = [
                r
                for t in sorted((output / part).glob("*.parquet"))
                for r in pq.read_table(t)["id"].to_pylist()
            ]
            assert stored == "".join(texts[number] for number in rows)


def test_metadata_and_control_tokens_stand_before_the_text_and_are_masked(tmp_path: Path) -> None:
    rows = [
        {"text": "good", "quality": 0.9, "url": "http://e.org", "year": 2020},
        {"text": "poor", "quality": 0.2, "url": "http://f.org"},
        {"text": "none", "url": "u"},
        {"text": "bare", "quality": 0.5},
    ]
    summary, table, options = preprocessed(
        tmp_path,
        rows,
        metadata_prefix=("url", "year"),
        control_tokens="quality: <|low|> 0.5 <|high|>",
    )
    tokenizer = small_tokenizer()
    special = tokenizer.special_tokens
    low, high, begin, end = (special[t] for t in ("<|low|>", "<|high|>", "<meta>", "</meta>"))
    assert options["control_token_ids"] == [low, high] and options["meta_token_ids"] == [begin, end]
    leads = [
        [high, begin, *tokenizer.encode("url: http://e.org\nyear: 2020\n"), end],
        [low, begin, *tokenizer.encode("url: http://f.org\n"), end],
        [high],
    ]
    texts = ["good", "poor", "bare"]
    for row, lead, text in zip(table, leads, texts, strict=True):
        assert row["masked_tokens"] == len(lead)
        assert row["ids"] == [*lead, *tokenizer.encode(text), tokenizer.eod_id]
    assert summary.rejects == {"no score 'quality'": 1}


def test_templates_and_normalisation_are_recorded(tmp_path: Path) -> None:
    rows = [{"q": "Cafe\u0301?\r\n", "a": 42}, {"q": "no answer"}, {"q": "x", "a": None}]
    how = {"template": "Q: {q}A: {a} {{}}", "normalize": ("nfc", "newlines", "strip")}
    summary, table, options = preprocessed(tmp_path, rows, **how)
    text = small_tokenizer().decode(table[0]["ids"])
    assert text == "Q: Café?\nA: 42 {}" and len(table) == 1
    assert summary.rejects == {"no field 'a'": 2}
    assert (options["template"], options["normalize"]) == (how["template"], list(how["normalize"]))
