"""What training would refuse, found before a rank is started, a folder claimed or a byte written.

``check_run`` is what ``train``, ``submit``, ``plan`` and ``check`` all ask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

from megatron_curr.data.survey import Survey
from megatron_curr.errors import CheckpointError, UserError
from megatron_curr.plan.shapes import AnyRecipe
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import RunRecipe
from megatron_curr.training.preflight import Prepared, prepare
from megatron_curr.training.room import Room, check_room, num_weights
from megatron_curr.units import format_bytes, format_count


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A run that training would start, as it would start it."""

    name: str
    run_folder: str
    ranks: int
    num_weights: int
    vocab_size: int  # 0 for video
    source_tokens: dict[str, int]
    heldout_sources: list[str]
    init_from: str | None
    start_tokens: int  # 0, or where the newest checkpoint stands
    total_tokens: int
    num_samples: int  # or lots
    room: Room
    changes: list[str]  # since the run was last started
    warnings: list[str]  # what is no fault

    def as_json(self) -> str:
        """For scripts."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """For people."""
        names = ", ".join(f"{name} {format_count(n)}" for name, n in self.source_tokens.items())
        heldout = ", ".join(self.heldout_sources) or "of no source, so nothing is evaluated"
        words = "" if not self.vocab_size else f", a vocabulary of {self.vocab_size:,}"
        first = f"as {self.init_from}" if self.init_from else "drawn from the seed"
        lines = [
            f"run      {self.name} in {self.run_folder}, on {self.ranks} ranks",
            f"model    {format_count(self.num_weights)} parameters{words}; first weights {first}",
            f"sources  {names} tokens",
            f"held out {heldout}",
            f"order    {self.num_samples:,} samples, {self.total_tokens:,} tokens",
            f"disk     {format_bytes(self.room.free_bytes)} free, two checkpoints need "
            f"{format_bytes(self.room.needed_bytes)}",
            *(f"changed  {change}" for change in self.changes),
            *self.warnings,
            f"training would start at token {self.start_tokens:,}; nothing was written",
        ]
        return "\n".join(lines)


def check_run(recipe: AnyRecipe, ranks: int) -> Prepared:
    """A run with all that it reads. Raises ``UserError`` for what training would refuse."""
    prepared = prepare(recipe, ranks)
    begins_now = not prepared.folder.has_checkpoints
    if recipe.init_from is not None and begins_now:  # torch is loaded for nothing else here
        from megatron_curr.convert.init_check import check_first_weights

        try:
            told = check_first_weights(prepared.recipe, vocab_size=prepared.vocab_size)
        except CheckpointError as error:
            raise CheckpointError(f"init_from: {error}") from None
        prepared = replace(prepared, warnings=(*prepared.warnings, *told))
    check_room(prepared)
    return prepared


def check_recipe_file(
    path: Path, overrides: Sequence[str] = (), ranks: int | None = None
) -> Checked:
    """``megatron-curr check``; the fewest ranks that the layout takes where none are given.

    Raises ``UserError``, as ``check_run`` does, and where a run holds the folder.
    """
    recipe = load_recipe(path, overrides)
    ranks = ranks or least_ranks(recipe)
    prepared = check_run(recipe, ranks)
    prepared.folder.check_free()
    state, order = prepared.folder.newest_state(), prepared.order
    sizes = zip(order.sources, order.num_tokens.tolist(), strict=True)
    return Checked(
        name=recipe.name,
        run_folder=str(prepared.folder.path),
        ranks=ranks,
        num_weights=num_weights(prepared),
        vocab_size=prepared.vocab_size,
        source_tokens={str(name): size for name, size in sizes},
        heldout_sources=list(prepared.heldout_sets),
        init_from=recipe.init_from,
        start_tokens=state.consumed_tokens if state else 0,
        total_tokens=prepared.schedule.total_tokens,
        num_samples=prepared.schedule.total_samples,
        room=check_room(prepared),
        changes=[str(change) for change in prepared.changes],
        warnings=list(prepared.warnings),
    )


def refusal_of(recipe: AnyRecipe, ranks: int, survey: Survey) -> str | None:
    """Why training would refuse; None where it would not, or where the data is not here."""
    if not survey.is_whole:
        return None
    try:
        check_run(recipe, ranks)
    except UserError as error:
        return str(error)
    return None


def least_ranks(recipe: RunRecipe) -> int:
    """Ranks of one replica."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return prod(getattr(recipe.parallel, size) for size in sizes)
