"""Weights as a Hugging Face folder: safetensors, config, tokenizer, generation config, card."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_curr.convert.card import tell_history, write_card
from megatron_curr.convert.carried import carry_files, left_behind
from megatron_curr.convert.family import Family
from megatron_curr.convert.hf_config import write_config
from megatron_curr.convert.safetensors_out import Written, write_safetensors
from megatron_curr.convert.source import Source
from megatron_curr.convert.target import check_empty, written_beside
from megatron_curr.convert.tokenizer import write_tokenizer
from megatron_curr.data.identity import load_tokenizer_of
from megatron_curr.data.shards import ShardSet, open_shards
from megatron_curr.errors import DataError, RecipeError
from megatron_curr.recipe.schema import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_FILE_BYTES = 4 * 10**9
CHECKED_TOKENS = 20_000  # of held-out text, per source, on which the tokenizers are compared


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    source: Path
    architecture: str
    dtype: str
    num_parameters: int
    size_bytes: int
    notes: tuple[str, ...]
    """What of the source is not in it, or not as it was."""


def export(
    source: Source,
    output: Path,
    *,
    dtype: str | None = None,
    architecture: str | None = None,
    chat_template: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
    check: Callable[[Path], None] = lambda folder: None,
) -> Export:
    """Write ``source`` as a Hugging Face folder.

    ``dtype`` is one of ``DTYPES``; the default is as stored. ``check`` is shown the folder before
    it takes its place, and raises what is wrong with it. Raises a ``UserError`` and leaves nothing
    behind when the target is not empty, no architecture fits, or tensors do not match.
    """
    check_empty(output)
    to = read_dtype(dtype)
    family = source.family(architecture)
    pieces = source.pieces(family)
    plan = source.plan(
        to="hf", dtype=dtype, architecture=family.architecture, max_file_bytes=max_file_bytes
    )
    with written_beside(output, plan) as folder:
        sizes = write_safetensors(
            source.weights,
            pieces,
            folder,
            dtype=to,
            max_file_bytes=max_file_bytes,
            on_bytes=on_bytes,
        )
        write = _write_run_files if source.run else _write_carried_files
        notes = write(source, folder, family=family, sizes=sizes)
        if chat_template is not None:
            _write_chat_template(chat_template, folder)
        check(folder)
    return Export(
        folder=output,
        source=source.path,
        architecture=family.architecture,
        dtype=sizes.dtype,
        num_parameters=sizes.num_parameters,
        size_bytes=sizes.size_bytes,
        notes=notes,
    )


def read_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of this name; None stays None. Raises ``RecipeError``."""
    if name is not None and name not in DTYPES:
        raise RecipeError(f"--dtype {name!r}: must be one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def heldout_sets(recipe: Recipe) -> dict[str, ShardSet]:
    """Held-out shards by source, those that are still on this machine."""
    found = {}
    for name, source in recipe.data.sources.items():
        if source.heldout is not None:
            try:
                found[name] = open_shards(source.heldout, name=name)
            except DataError:
                continue  # a run is converted elsewhere, too; the hard texts are tried in any case
    return found


def documents_begin_with(recipe: Recipe) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids before every document, as shards that are on this machine say; and what to tell."""
    is_here = False
    for source in recipe.data.sources.values():
        for spec in filter(None, (source.shards, source.heldout)):
            try:
                made_by = open_shards(spec).tokenizers
            except DataError:
                continue
            is_here = True
            if made_by:  # training refuses sources that differ
                return made_by[0].bos_ids, ()
    if is_here:  # of another tool: it says nothing
        return (), ()
    note = "no shards of the run are on this machine to say whether documents begin with a BOS: "
    return (), (f"{note}the exported tokenizer puts none before a text",)


def _write_run_files(
    source: Source, folder: Path, *, family: Family, sizes: Written
) -> tuple[str, ...]:
    run = source.run
    assert run
    recipe = run.recipe
    tokenizer = load_tokenizer_of(run.folder, recipe.data.tokenizer)
    config = write_config(
        source.model, family, vocab_size=source.vocab_size, token_ids={}, dtype=sizes.dtype
    )
    # Transformers chooses a tokenizer's class by the config, too.
    write_json(folder / "config.json", config)
    begins_with, notes = documents_begin_with(recipe)
    published = write_tokenizer(
        recipe.data.tokenizer,
        folder,
        max_tokens=source.model.max_position_embeddings,
        begins_with=begins_with,
        texts=[tokenizer.decode(ids) for ids in _heldout_ids(recipe)],
    )
    write_json(folder / "config.json", {**config, **published.token_ids})
    write_json(folder / "generation_config.json", dict(published.token_ids))
    write_card(
        run,
        folder,
        architecture=family.architecture,
        num_parameters=sizes.num_parameters,
        made_by=source.history,
        tokenizer=published,
    )
    return (*notes, *published.notes)


def _write_carried_files(
    source: Source, folder: Path, *, family: Family, sizes: Written
) -> tuple[str, ...]:
    """Of a model that was published before: its own files, and the config of what it is now."""
    token_ids: dict[str, int | None] = {}
    notes: tuple[str, ...] = ()
    if source.carried:
        notes = left_behind(source.carried, carry_files(source.carried, folder))
        published = source.carried / "config.json"
        if published.is_file():
            old = json.loads(published.read_text(encoding="utf-8"))
            names = ("bos_token_id", "eos_token_id", "pad_token_id")
            token_ids = {name: old[name] for name in names if name in old}
    config = write_config(
        source.model,
        family,
        vocab_size=source.vocab_size,
        token_ids=token_ids,
        dtype=sizes.dtype,
    )
    write_json(folder / "config.json", config)
    if source.history:
        tell_history(folder / "README.md", source.history)
    return notes


def _write_chat_template(template: Path, folder: Path) -> None:
    """Where transformers 5 looks for it, and where 4 does, once it parses."""
    import jinja2

    try:
        text = template.read_text(encoding="utf-8")
        jinja2.Environment().parse(text)
    except (OSError, UnicodeDecodeError, jinja2.TemplateSyntaxError) as error:
        raise DataError(f"{template}: is no chat template ({error}); give a Jinja file") from error
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**settings, "chat_template": text})


def _heldout_ids(recipe: Recipe) -> Iterator[list[int]]:
    for shards in heldout_sets(recipe).values():
        ids = shards.read(0, min(CHECKED_TOKENS, shards.num_tokens)).tolist()
        yield from (ids[start : start + 1000] for start in range(0, len(ids), 1000))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, with a newline at the end."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
