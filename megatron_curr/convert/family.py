"""What an architecture's table says: names, fused layouts, config fields; read in both directions.

A Hugging Face tensor is rows of one tensor of ours, of the same width: a fused weight is a list of
row ranges, and what ranges of a tensor of ours no Hugging Face tensor fills is padding. Tensors of
ours go by the names megatron-core stores them under, with the layer and the expert spelled out;
``stored.py`` knows in which dim of a stored tensor those lie.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_curr.convert import rotations
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.model import Model

Rows = tuple[tuple[int, int], ...]
"""Half-open ranges of rows, in order."""
RowsOf = Callable[[Model], Rows]
WidthOf = Callable[[Model], int]
Where = Literal["every", "dense", "sparse"]

# Settings of a model that say how it is trained or padded, not what it computes.
_NEUTRAL = {
    *("preset", "vocab_size", "make_vocab_size_divisible_by", "init_method_std"),
    *("moe_aux_loss_coeff", "moe_router_bias_update_rate"),
}
# What ``hf_config.py`` reads and writes for every family.
_SHARED = rotations.SETTINGS | {"untie_embeddings_and_output_weights"}


@dataclass(frozen=True)
class Piece:
    """One tensor to publish: its name, its shape, and the rows of ours that it is."""

    published: str
    shape: tuple[int, ...]
    stored: str
    rows: Rows
    is_vocabulary: bool = False  # ours may have more rows, which pad it

    @property
    def num_values(self) -> int:
        """Numbers in it."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class Entry:
    """One Hugging Face tensor; one a layer or expert where names hold ``{layer}``, ``{expert}``."""

    published: str
    stored: str
    rows: RowsOf | None  # None: the vocabulary
    columns: WidthOf | None = None  # None: a vector
    where: Where = "every"
    when: Callable[[Model], bool] = lambda model: True

    def pieces(self, model: Model, *, vocab_size: int, layer: int | None) -> Iterator[Piece]:
        """Its tensors in one layer, or outside the layers."""
        rows = self.rows(model) if self.rows else ((0, vocab_size),)
        count = sum(end - start for start, end in rows)
        shape = (count,) if self.columns is None else (count, self.columns(model))
        experts = range(model.num_moe_experts or 0) if "{expert}" in self.published else (None,)
        for expert in experts:
            names = {"layer": layer, "expert": expert}
            yield Piece(
                self.published.format(**names),
                shape,
                self.stored.format(**names),
                rows,
                self.rows is None,
            )


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture that our model can be exactly."""

    architecture: str
    model_type: str
    head: tuple[Entry, ...]
    layer: tuple[Entry, ...]
    tail: tuple[Entry, ...]
    names: Mapping[str, str]
    """Config field to the setting of ``Model`` it is."""
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config field to the values under which the table holds; the first is written."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Settings of ``Model`` that the architecture has without a config field."""
    free: frozenset[str] = frozenset()
    """Settings of ``Model`` that do not matter to it."""
    write: Callable[[Model], dict[str, Any]] = lambda model: {}
    """Config fields that take arithmetic; raises ``RecipeError`` for what has none."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    """The inverse of ``write``: settings of ``Model``."""
    computed: frozenset[str] = frozenset()
    """Settings of ``Model`` that ``read`` gives and ``write`` checks."""
    reads: frozenset[str] = frozenset()
    """Config fields that ``read`` looks at."""
    harmless: Mapping[str, str] = field(default_factory=dict)
    """Config fields of this class alone that change no logit, and why."""
    stretched: frozenset[str] = rotations.DENSE
    """Kinds of rotations beside the plain one."""
    is_partly_rotated: bool = False
    """Whether it has a config field for the part of a head that is rotated."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Config fields and their defaults, where transformers has no class of it."""
    also_known_as: tuple[str, ...] = ()
    """Other values of ``architectures`` in configs of the same table."""
    also_of_type: tuple[str, ...] = ()
    """Other values of ``model_type``, whose config class has other defaults."""
    windows_rotate_apart: bool = False
    """Whether its config gives layers with a window rotations of their own."""
    ignored: str | None = None
    """Pattern of published tensors that are not weights of this model, ``NUM_LAYERS`` in it."""

    def pieces(self, model: Model, *, vocab_size: int) -> Iterator[Piece]:
        """Every tensor of the published model, in the order of the forward pass."""
        for entry in self._entries(self.head, model):
            yield from entry.pieces(model, vocab_size=vocab_size, layer=None)
        for layer, has_experts in enumerate(model.moe_layers):
            for entry in self._entries(self.layer, model):
                if entry.where in ("every", "sparse" if has_experts else "dense"):
                    yield from entry.pieces(model, vocab_size=vocab_size, layer=layer)
        for entry in self._entries(self.tail, model):
            yield from entry.pieces(model, vocab_size=vocab_size, layer=None)

    def misfit(self, model: Model) -> str | None:
        """The first setting by which ``model`` is not of this architecture; None when it is."""
        given = {*self.names.values(), *self.computed, *self.free, *_NEUTRAL, *_SHARED}
        if self.windows_rotate_apart:
            given.add("window_rotary_base")
        for name, info in Model.model_fields.items():
            if name in given or (model.num_moe_experts is None and name.startswith("moe_")):
                continue
            if not model.has_latent_attention and name.startswith(("qk_pos_", "qk_head", "v_head")):
                continue
            expected = self.requires.get(name, info.default)
            if getattr(model, name) != expected:
                return f"{name} is {getattr(model, name)!r}, there {expected!r}"
        try:
            self.rotations(model)
            self.write(model)
        except RecipeError as reason:
            return str(reason)
        return None

    def config(self, model: Model) -> dict[str, Any]:
        """The architecture's own part of ``config.json``."""
        return {
            **{published: getattr(model, ours) for published, ours in self.names.items()},
            **{published: values[0] for published, values in self.fixed.items()},
            **self.write(model),
        }

    def settings(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of ``Model`` from a ``config.json``.

        ``config`` is one that ``config_fields.settle`` has been through. Raises ``CheckpointError``
        that names the field under which the table does not hold.
        """
        for published, values in self.fixed.items():
            found = config.get(published, values[0])
            if found not in values:
                raise CheckpointError(
                    f"config.json: {published} is {found!r}; {self.architecture} converts with "
                    f"{' or '.join(map(repr, values))} only"
                )
        named = {
            ours: config[published]
            for published, ours in self.names.items()
            if config.get(published) is not None
        }
        rope = rotations.read_rotations(
            config["rope"],
            kinds=self.stretched,
            is_partial=self.is_partly_rotated,
            max_positions=config.get("max_position_embeddings") or 0,
        )
        if self.windows_rotate_apart:
            rope |= rotations.read_window_rotations(config)
        return {**self.requires, **rope, **named, **self.read(config)}

    def rotations(self, model: Model) -> dict[str, Any]:
        """``rope_parameters`` of a config; raises ``RecipeError`` for those it does not have."""
        return rotations.write_rotations(
            model, kinds=self.stretched, is_partial=self.is_partly_rotated
        )

    @property
    def fields(self) -> frozenset[str]:
        """Config fields that are read, or whose values are refused, or that change no logit."""
        return frozenset({*self.names, *self.fixed, *self.reads, *self.harmless})

    def is_ignored(self, published: str, model: Model) -> bool:
        """Whether a published tensor is something else than a weight of this model."""
        pattern = (self.ignored or "").replace("NUM_LAYERS", str(model.num_layers))
        return re.fullmatch(pattern, published) is not None

    @staticmethod
    def _entries(entries: tuple[Entry, ...], model: Model) -> Iterator[Entry]:
        return (entry for entry in entries if entry.when(model))


def all_rows(width: WidthOf) -> RowsOf:
    """Every row of a tensor of this height."""
    return lambda model: ((0, width(model)),)


def hidden(model: Model) -> int:
    """Width of the residual stream."""
    return model.hidden_size


def query_width(model: Model) -> int:
    """Width of all query heads."""
    return model.num_attention_heads * model.kv_channels


def key_width(model: Model) -> int:
    """Width of all key heads."""
    return model.num_query_groups * model.kv_channels


def head_width(model: Model) -> int:
    """Width of one head."""
    return model.kv_channels


def ffn(model: Model) -> int:
    """Width of the MLP."""
    return model.ffn_hidden_size


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


def gate_rows(width: WidthOf) -> RowsOf:
    """Rows of a SwiGLU's gate in the fused projection: the first half."""
    return lambda model: ((0, width(model)),)


def up_rows(width: WidthOf) -> RowsOf:
    """Rows of a SwiGLU's linear branch in the fused projection: the second half."""
    return lambda model: ((width(model), 2 * width(model)),)


def untied(model: Model) -> bool:
    """Whether the output layer has a matrix of its own."""
    return model.untie_embeddings_and_output_weights
