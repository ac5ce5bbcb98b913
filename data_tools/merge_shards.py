"""``merge-shards`` and ``split-shards``: the shards of one or more folders, cut to another size."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from data_tools.document_table import table_path
from data_tools.shard_cutter import Part, ShardPlan, build_shard, cut
from data_tools.workers import Workers
from megatron_curr.data.idx_format import read_header
from megatron_curr.data.manifest import Manifest, TokenizerRecord, read_manifest, write_manifest
from megatron_curr.data.shards import open_shards
from megatron_curr.errors import DataError


def recut_shards(
    inputs: Sequence[Path], output: Path, *, shard_tokens: int, num_workers: int = 1
) -> Manifest:
    """Write the documents of all inputs, in order, to shards of ``shard_tokens`` in ``output``.

    Document tables come along where every input shard has one of the same columns. Raises
    ``DataError`` for inputs that do not belong together and for an output that is there.
    """
    if output.exists():
        raise DataError(f"{output}: already there; give another --output")
    if shard_tokens <= 0:
        raise DataError(f"shard_tokens {shard_tokens}: must be positive")
    prefixes = [shard.prefix for given in inputs for shard in open_shards(given).shards]
    _check_different(prefixes)
    headers = [read_header(prefix) for prefix in prefixes]
    known = _manifests(prefixes)
    dtype, tokenizer = _in_common(inputs, {str(header.dtype) for header in headers}, known)
    schemas = [pq.read_schema(p) if p.is_file() else None for p in map(table_path, prefixes)]
    schema = schemas[0] if all(s is not None and s.equals(schemas[0]) for s in schemas) else None
    staging = output.with_name(output.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    parts = [
        Part(prefix, 0, header.num_documents)
        for prefix, header in zip(prefixes, headers, strict=True)
        if header.num_documents
    ]
    plans = [
        ShardPlan(staging / f"{output.name}_{number:05d}", dtype, shard, schema)
        for number, shard in enumerate(cut(parts, shard_tokens=shard_tokens))
    ]
    records = {}
    with Workers(num_workers, num_counters=1, preload=("data_tools.shard_cutter",)) as workers:
        done = workers.run(build_shard, plans, name_of=lambda plan: plan.prefix.name)
        for number, result in done:
            if isinstance(result, Exception):
                shutil.rmtree(staging, ignore_errors=True)
                if isinstance(result, OSError) and result.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DataError(f"{staging}: the disk is full; nothing was written") from result
                raise result
            records[number] = result
    manifest = Manifest(
        dtype=dtype,
        tokenizer=tokenizer,
        shards=tuple(records[number] for number in sorted(records)),
        options={**_shared_options(known), "cut_from": [str(given) for given in inputs]},
    )
    write_manifest(staging, manifest)
    os.rename(staging, output)
    return manifest


def _check_different(prefixes: Sequence[Path]) -> None:
    """Raise ``DataError`` for a shard that would be in the output twice."""
    seen: set[Path] = set()
    for prefix in prefixes:
        place = prefix.resolve()
        if place in seen:
            raise DataError(
                f"{prefix}: given twice, so its documents would be there twice; list it once "
                "(a source is read several times with max_epochs)"
            )
        seen.add(place)


def _manifests(prefixes: Sequence[Path]) -> list[Manifest]:
    found = map(read_manifest, dict.fromkeys(prefix.parent for prefix in prefixes))
    return [manifest for manifest in found if manifest is not None]


def _in_common(
    inputs: Sequence[Path], dtypes: set[str], known: Sequence[Manifest]
) -> tuple[str, TokenizerRecord | None]:
    """Token type and tokenizer of all inputs. Raises ``DataError`` where they have several."""
    tokenizers = {
        (m.tokenizer.sha256, m.tokenizer.bos_ids): m.tokenizer
        for m in known
        if m.tokenizer is not None
    }
    if len(dtypes) > 1 or len(tokenizers) > 1:
        names = dtypes if len(dtypes) > 1 else {made.name for made in tokenizers.values()}
        raise DataError(
            f"{', '.join(map(str, inputs))}: made with different tokenizers or --bos "
            f"({', '.join(sorted(names))}); shards of one source share one: preprocess the others "
            "again"
        )
    return min(dtypes), next(iter(tokenizers.values()), None)


def _shared_options(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """What all inputs were made with, but not what names them as a whole."""
    if not manifests:
        return {}
    left_out = ("plan", "shard_tokens", "unknown")
    first = {k: v for k, v in manifests[0].options.items() if k not in left_out}
    return {
        key: value
        for key, value in first.items()
        if all(key in m.options and m.options[key] == value for m in manifests)
    }
