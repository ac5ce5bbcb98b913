"""The last step of preprocessing: shards from finished units, and their manifests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.dedup import mark_duplicates
from data_tools.document_table import table_path, table_schema
from data_tools.rejections import line_bases, list_rejects
from data_tools.shard_cutter import Part, ShardPlan, build_shard, cut
from data_tools.staging import SPLITS
from data_tools.unit_work import UnitRecord, total
from data_tools.unknown_text import Unknown
from data_tools.workers import Workers
from megatron_curr.data.idx_format import idx_path, token_dtype
from megatron_curr.data.manifest import Manifest, ShardRecord, TokenizerRecord, write_manifest
from megatron_curr.durable import write_durably

if TYPE_CHECKING:
    from data_tools.preprocess_text import Run


def make_shards(run: Run, records: Sequence[UnitRecord], workers: Workers) -> Path:
    """Everything of the output, in a folder of the staging area; that folder.

    Shards that a run before this one finished are not made again.
    """
    folder = run.staging / f"final_{_key(run)}"
    for other in run.staging.glob("final_*"):
        if other.name not in (folder.name, f"{folder.name}_records"):
            shutil.rmtree(other)
    bases = line_bases(run, records)
    made: dict[str, list[ShardRecord]] = {}
    duplicates = 0
    for split in SPLITS:
        parts, repeated = _parts(run, records, bases, split)
        duplicates += repeated
        made[split] = _build(run, folder, split, parts, workers)
    folder.mkdir(exist_ok=True)
    list_rejects(run, records, folder)
    facts = {
        "inputs": [{"file": str(path), "bytes": path.stat().st_size} for path in run.files],
        "rejected_rows": total(record.rejects for record in records),
        "passed_over": total([run.passed_over, *(record.passed_over for record in records)]),
        "mended_rows": sum(record.mended for record in records),
        "filtered_documents": sum(record.filtered for record in records),
        "duplicate_documents": duplicates,
        "engine": run.verdict.record() if run.verdict else None,
        "plan": run.plan_key,
    }
    for split, shards in made.items():
        if shards:
            unknown = asdict(Unknown.total(record.unknown[split] for record in records))
            of_split = {**facts, "unknown": unknown}
            write_manifest(folder / split, _manifest(run, split, shards, of_split))
    return folder


def _key(run: Run) -> str:
    """Everything the final shards depend on, input files' times included."""
    content = [[unit.key for unit in run.units], run.options.record()]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _parts(
    run: Run, records: Sequence[UnitRecord], bases: Sequence[int], split: str
) -> tuple[list[Part], int]:
    """The documents of one side in order, and how many repetitions are left out of them."""
    counts = [record.shards[split].num_documents for record in records]
    prefixes = [run.unit_folder / unit.key / split for unit in run.units]
    keep, duplicates = None, 0
    if run.options.deduplicate:
        keep = run.staging / f"keep_{split}"
        duplicates = mark_duplicates(
            [table_path(prefix) for prefix in prefixes],
            sum(counts),
            keep,
            folder=run.staging / "hashes",
        )
    starts = accumulate(counts, initial=0)
    parts = [
        Part(prefix, 0, count, base, keep, start)
        for prefix, count, base, start in zip(prefixes, counts, bases, starts, strict=False)
        if count
    ]
    return parts, duplicates


def _build(
    run: Run, folder: Path, split: str, parts: Sequence[Part], workers: Workers
) -> list[ShardRecord]:
    # The source is part of the name, so that a shard is known by its name alone in a mixture.
    dtype, schema = token_dtype(run.tokenizer.vocab_size), table_schema(run.options.columns)
    plans = [
        ShardPlan(
            folder / split / f"{run.output.name}_{split}_{number:05d}", str(dtype), shard, schema
        )
        for number, shard in enumerate(cut(parts, shard_tokens=run.options.shard_tokens))
    ]
    notes = folder.with_name(f"{folder.name}_records")
    notes.mkdir(exist_ok=True)
    paths = [notes / f"{plan.prefix.name}.json" for plan in plans]
    # A run killed while it tidied up left the records, but its shards are published by then.
    made = [
        path.is_file() and idx_path(plan.prefix).is_file()
        for path, plan in zip(paths, plans, strict=True)
    ]
    todo = [number for number, is_made in enumerate(made) if not is_made]
    missing = [plans[number] for number in todo]
    for done, result in workers.run(build_shard, missing, name_of=lambda plan: plan.prefix.name):
        if isinstance(result, Exception):
            raise result
        write_durably(paths[todo[done]], json.dumps(asdict(result)))
        run.progress.note(f"{result.name}: {result.num_tokens:,} tokens", every_s=10)
    return [ShardRecord(**json.loads(path.read_bytes())) for path in paths]


def _manifest(
    run: Run, split: str, shards: Sequence[ShardRecord], facts: dict[str, Any]
) -> Manifest:
    tokenizer = run.tokenizer
    return Manifest(
        dtype=str(token_dtype(tokenizer.vocab_size)),
        tokenizer=TokenizerRecord(
            tokenizer.name,
            tokenizer.sha256,
            tokenizer.vocab_size,
            tokenizer.eod_id,
            run.preparation.bos_ids,
        ),
        shards=tuple(shards),
        options={
            **run.options.record(),
            **run.preparation.record(),
            **facts,
            "tokenizer": str(tokenizer.path),
            "split": split,
        },
    )
