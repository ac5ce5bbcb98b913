"""A checkpoint as a Hugging Face folder: weights, config, tokenizer, generation config, card.

The folder is written beside its place under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_curr.convert import llama, qwen2, qwen3
from megatron_curr.convert.card import write_card
from megatron_curr.convert.family import Family, Piece, shared_config
from megatron_curr.convert.source import find_source
from megatron_curr.convert.stored import StoredTensors, open_stored
from megatron_curr.convert.tokenizer import write_tokenizer
from megatron_curr.data.shards import ShardSet, open_shards
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import CheckpointError, DataError, RecipeError
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.schema import Recipe

FAMILIES: tuple[Family, ...] = (llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MAX_SHARD_BYTES = 4 * 10**9
CHECKED_TOKENS = 20_000  # of held-out text, per source, on which the tokenizers are compared
# What a checkpoint holds besides the model's weights.
_NOT_WEIGHTS = ("optimizer.", "rng_state", "rerun_state")


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    checkpoint: Path
    architecture: str
    dtype: str
    num_parameters: int
    size_bytes: int
    passed_over: tuple[str, ...]  # torn checkpoints newer than the one converted


def export_run(
    run: Path, output: Path, *, dtype: str | None = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> Export:
    """Convert a run's newest intact checkpoint, or the checkpoint that ``run`` names.

    ``dtype`` is ``fp32`` or ``bf16``; the default is as stored. Raises a ``UserError`` and leaves
    nothing behind when the target is not empty, no architecture fits, or tensors do not match.
    """
    check_empty(output)
    if dtype is not None and dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype!r}: must be one of {', '.join(DTYPES)}")
    source = find_source(run)
    model = source.recipe.model
    family = choose_family(model)
    tokenizer = load_tokenizer(source.recipe.data.tokenizer)
    vocab_size = model.vocab_size or tokenizer.vocab_size
    stored = open_stored(source.checkpoint)
    pieces = tuple(family.pieces(model, vocab_size=vocab_size))
    check_complete(stored, pieces, model)
    with _beside(output) as folder:
        sizes = write_weights(
            stored, pieces, folder, dtype=DTYPES.get(dtype or ""), max_shard_bytes=max_shard_bytes
        )
        config = {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            **shared_config(model, vocab_size=vocab_size, eod_id=tokenizer.eod_id),
            **family.config_fields(model),
            "dtype": sizes.dtype,
            "torch_dtype": sizes.dtype,
        }
        _write_json(folder / "config.json", config)
        generation = {"bos_token_id": tokenizer.eod_id, "eos_token_id": tokenizer.eod_id}
        _write_json(folder / "generation_config.json", generation)
        write_tokenizer(
            source.recipe.data.tokenizer,
            folder,
            max_tokens=model.max_position_embeddings,
            texts=[tokenizer.decode(ids) for ids in _heldout_ids(source.recipe)],
        )
        write_card(
            source, folder, architecture=family.architecture, num_parameters=sizes.num_parameters
        )
    return Export(
        folder=output,
        checkpoint=source.checkpoint,
        architecture=family.architecture,
        dtype=sizes.dtype,
        num_parameters=sizes.num_parameters,
        size_bytes=sizes.size_bytes,
        passed_over=source.passed_over,
    )


def choose_family(model: Model) -> Family:
    """The architecture that is this model exactly. Raises ``RecipeError`` when there is none."""
    if model.num_moe_experts is not None:
        raise RecipeError(
            f"model.num_moe_experts={model.num_moe_experts}: there is no table here for experts; "
            "dense ones convert: " + ", ".join(family.architecture for family in FAMILIES)
        )
    found = next((family for family in FAMILIES if family.fits(model)), None)
    if found is None:
        raise RecipeError(
            "no Hugging Face architecture known here is exactly this model: "
            f"qk_layernorm={model.qk_layernorm}, add_qkv_bias={model.add_qkv_bias}, "
            f"kv_channels={model.kv_channels}, num_attention_heads={model.num_attention_heads}, "
            f"hidden_size={model.hidden_size}; known: "
            + ", ".join(family.architecture for family in FAMILIES)
        )
    return found


def check_empty(output: Path) -> None:
    """Raise ``CheckpointError`` when the target holds anything."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(
            f"{output}: is not an empty folder; give another target or remove it first"
        )


def check_complete(stored: StoredTensors, pieces: Sequence[Piece], model: Model) -> None:
    """Raise ``CheckpointError`` for a tensor that is missing, left over, or of another size."""

    def foreign(found: str) -> CheckpointError:
        return CheckpointError(
            f"{stored.checkpoint}: {found}; was the checkpoint saved with another recipe?"
        )

    used_rows: dict[str, int] = {}
    for piece in pieces:
        shape = stored[piece.stored].shape
        if piece.layer is not None:
            if shape[0] != model.num_layers:
                raise foreign(
                    f"{piece.stored} has {shape[0]} layers and the recipe {model.num_layers}"
                )
            shape = shape[1:]
        if piece.layer in (None, 0):
            num_rows = sum(end - start for start, end in piece.rows) if piece.rows else shape[0]
            used_rows[piece.stored] = used_rows.get(piece.stored, 0) + num_rows
        if piece.is_vocabulary and shape[1] != model.hidden_size:
            raise foreign(f"{piece.stored} is {shape[1]} wide and the recipe {model.hidden_size}")
    padded = {piece.stored for piece in pieces if piece.is_vocabulary}
    layered = {piece.stored for piece in pieces if piece.layer is not None}
    for name, num_rows in used_rows.items():
        num_stored = stored[name].shape[1 if name in layered else 0]
        if num_rows > num_stored or (num_rows < num_stored and name not in padded):
            raise foreign(f"{name} has {num_stored} rows and the recipe {num_rows}")
    extra = [n for n in stored if n not in used_rows and not n.startswith(_NOT_WEIGHTS)]
    if extra:
        raise foreign(f"{', '.join(sorted(extra)[:4])} has no place in the published model")


@dataclass(frozen=True)
class Weights:
    """Sizes of what ``write_weights`` wrote."""

    dtype: str
    num_parameters: int
    size_bytes: int


def write_weights(
    stored: StoredTensors,
    pieces: Sequence[Piece],
    folder: Path,
    *,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
) -> Weights:
    """Write safetensors files of at most ``max_shard_bytes`` (or one tensor), and their index."""
    from safetensors.torch import save_file

    files = _split(stored, pieces, dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    num_parameters = size_bytes = 0
    for number, group in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {piece.published: read_piece(stored, piece, dtype) for piece in group}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        num_parameters += sum(tensor.numel() for tensor in tensors.values())
        size_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        totals = {"total_size": size_bytes, "total_parameters": num_parameters}
        index = {"metadata": totals, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)
    written = dtype or stored[pieces[0].stored].dtype
    return Weights(str(written).removeprefix("torch."), num_parameters, size_bytes)


def read_piece(stored: StoredTensors, piece: Piece, dtype: torch.dtype | None) -> Tensor:
    """One published tensor, contiguous and owning its memory."""
    tensor = stored.read(piece.stored, piece.layer)
    if piece.rows:
        tensor = torch.cat([tensor[start:end] for start, end in piece.rows])
    return tensor.to(dtype or tensor.dtype, copy=not piece.rows).contiguous()


def _split(
    stored: StoredTensors, pieces: Sequence[Piece], dtype: torch.dtype | None, most_bytes: int
) -> list[list[Piece]]:
    """Pieces grouped into files, in order."""
    groups: list[list[Piece]] = [[]]
    filled = 0
    for piece in pieces:
        tensor = stored[piece.stored]
        shape = tensor.shape[0 if piece.layer is None else 1 :]
        num_rows = sum(end - start for start, end in piece.rows) if piece.rows else shape[0]
        size = num_rows * (dtype or tensor.dtype).itemsize
        for width in shape[1:]:
            size *= width
        if groups[-1] and filled + size > most_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(piece)
        filled += size
    return groups


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


def _heldout_ids(recipe: Recipe) -> Iterator[list[int]]:
    for shards in heldout_sets(recipe).values():
        ids = shards.read(0, min(CHECKED_TOKENS, shards.num_tokens)).tolist()
        yield from (ids[start : start + 1000] for start in range(0, len(ids), 1000))


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A folder that takes ``output``'s place when the block ends, and goes when it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        check_empty(output)
        os.replace(partial, output)  # over an empty folder, too
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
