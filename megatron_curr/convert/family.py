"""What an architecture's table says: names, fused layouts and config fields.

A Hugging Face tensor is rows of one stored tensor (of one layer of it). Fused weights are therefore
lists of row ranges, which read in both directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_curr.recipe.model import Model

Rows = tuple[tuple[int, int], ...]  # half-open ranges, in order; () means every row
RowsOf = Callable[[Model], Rows]


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor, or one a layer where the names hold ``{layer}``."""

    published: str
    stored: str
    rows: RowsOf | None = None
    per_layer: bool = False
    untied_only: bool = False
    is_vocabulary: bool = False  # padded rows at the end are cut off


@dataclass(frozen=True)
class Piece:
    """One tensor to publish and where it is stored."""

    published: str
    stored: str
    layer: int | None
    rows: Rows
    is_vocabulary: bool = False


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that megatron-core's GPT represents exactly."""

    architecture: str
    model_type: str
    entries: tuple[Entry, ...]
    fits: Callable[[Model], bool]
    config_fields: Callable[[Model], dict[str, Any]]  # those not shared by all

    def pieces(self, model: Model, *, vocab_size: int) -> Iterator[Piece]:
        """Every tensor of the published model, in the order of the forward pass."""
        for entry in self.entries:
            if entry.untied_only and not model.untie_embeddings_and_output_weights:
                continue
            rows = entry.rows(model) if entry.rows else ()
            if entry.is_vocabulary:
                rows = ((0, vocab_size),)
            for layer in range(model.num_layers) if entry.per_layer else (None,):
                published = entry.published.format(layer=layer)
                yield Piece(published, entry.stored, layer, rows, entry.is_vocabulary)


def query_rows(model: Model) -> Rows:
    """Rows of the queries in the fused projection: each group's queries, its key, its value."""
    per_group = model.num_attention_heads // model.num_query_groups
    width, head = (per_group + 2) * model.kv_channels, model.kv_channels
    return tuple((g * width, g * width + per_group * head) for g in range(model.num_query_groups))


def key_rows(model: Model) -> Rows:
    """Rows of the keys in the fused projection."""
    return tuple((end, end + model.kv_channels) for _, end in query_rows(model))


def value_rows(model: Model) -> Rows:
    """Rows of the values in the fused projection."""
    return tuple((end, end + model.kv_channels) for _, end in key_rows(model))


def gate_rows(model: Model) -> Rows:
    """Rows of the SwiGLU gate in the fused projection: the first half."""
    return ((0, model.ffn_hidden_size),)


def up_rows(model: Model) -> Rows:
    """Rows of the SwiGLU linear branch: the second half."""
    return ((model.ffn_hidden_size, 2 * model.ffn_hidden_size),)


def shared_config(model: Model, *, vocab_size: int, eod_id: int) -> dict[str, Any]:
    """Fields that every family's ``config.json`` has.

    Transformers 5 reads ``rope_parameters`` and ``dtype``, 4 reads ``rope_theta`` and
    ``torch_dtype`` and falls back to a theta of 10,000 without a word, so both are written.
    Documents begin after the end token of the one before: it is also the one to begin with.
    """
    return {
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_dropout": 0.0,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "bos_token_id": eod_id,
        "eos_token_id": eod_id,
    }
