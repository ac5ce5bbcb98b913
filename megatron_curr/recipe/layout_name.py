"""Layouts by name: ``tp2cp2sp`` is tensor 2, context 2, sequence parallel, on 4 ranks. No torch.

A name is a row of parts in any order; ``-`` and ``_`` may stand between them:

    tp2 pp2 vpp2 cp2 dp2      size of an axis (vpp: virtual pipeline stages of a rank)
    ring gather a2a hier      the exchange of context parallelism, as in ``cp2ring``; hier: a2a+p2p
    ep2 etp1                  expert parallelism, and over how many ranks one expert is cut
    sp do ov                  sequence parallelism, distributed optimizer, overlapped communication
    first1 last1              layers of an uneven pipeline's first and last stage
    rcfull rcsel              activation recompute, full or selective
    1                         one rank, nothing split

``recipe`` is the recipe's own layout. What a name leaves out is off where it splits the model, and
as the recipe has it where it does not (micro-batches, recompute, the exchange).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.check import recipe_problems
from megatron_curr.recipe.layout_rules import rank_problems
from megatron_curr.recipe.nearest_layouts import MOST, nearest_layouts
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.problems import Problem, problems_of, refusal
from megatron_curr.recipe.schema import Recipe, RunRecipe

AnyRun = TypeVar("AnyRun", bound=RunRecipe)

ONE_RANK = "1"
AS_RECIPE = "recipe"
_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_EXCHANGES = {"p2p": "ring", "all_gather": "gather", "a2a": "a2a", "a2a+p2p": "hier"}
_WORDS: dict[str, dict[str, Any]] = {
    "sp": {"sequence_parallel": True},
    "do": {"use_distributed_optimizer": True},
    "ov": {"overlap_grad_reduce": True},
    "rcfull": {"recompute_granularity": "full"},
    "rcsel": {"recompute_granularity": "selective"},
    **{word: {"context_parallel_exchange": value} for value, word in _EXCHANGES.items()},
}
_SPLITS = {
    *_SIZES.values(),
    "sequence_parallel",
    "use_distributed_optimizer",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "hierarchical_context_parallel_sizes",
}
_PART = re.compile(
    rf"(?P<axis>vpp|etp|tp|pp|cp|dp|ep|first|last)(?P<size>[1-9]\d*)|(?P<word>{'|'.join(_WORDS)})"
)
_EXAMPLES = "tp2sp, pp2vpp2, cp2ring, tp2pp2cp2spdo, dp2do, ep2 or 1"


@dataclass(frozen=True, slots=True)
class Layout:
    """A layout under its name: the recipe's ``parallel`` section for it, and its ranks."""

    name: str
    parallel: Parallel
    num_ranks: int

    def recipe(self, recipe: AnyRun) -> AnyRun:
        """The recipe on this layout."""
        return recipe.model_copy(update={"parallel": self.parallel})


def parse_layout(name: str, recipe: RunRecipe) -> Layout:
    """The layout of this name for the recipe; whether the model admits it is not looked at.

    Ranks are the fewest that hold the layout, times the data parallelism it names. Raises
    ``RecipeError`` for a name that means nothing.
    """
    if name == AS_RECIPE:
        return Layout(name, recipe.parallel, _fewest_ranks(recipe.parallel))
    settings = {
        field: value
        for field, value in recipe.parallel.model_dump().items()
        if field not in _SPLITS
    }
    dp_size = None
    for field, value in _settings_of(name):
        if field == "dp":
            dp_size = value
        elif field == "recompute_granularity":
            stale = [known for known in settings if known.startswith("recompute_")]
            settings = {**settings, **dict.fromkeys(stale), field: value}
        else:
            settings[field] = value
    if settings.get("overlap_grad_reduce") and settings.get("use_distributed_optimizer"):
        settings["overlap_param_gather"] = True
    try:
        parallel = Parallel(**settings)
    except ValidationError as error:
        raise RecipeError(f"layout {name}: {refusal(problems_of(error))}") from None
    if dp_size is None:
        return Layout(name, parallel, _fewest_ranks(parallel))
    return Layout(name, parallel, _model_ranks(parallel) * dp_size)


def name_of(parallel: Parallel, num_ranks: int) -> str:
    """The name of a layout on so many ranks; inverse of ``parse_layout``, without its recompute."""
    parts = []
    for axis, field in _SIZES.items():
        size = getattr(parallel, field)
        if size is not None and (size > 1 or Parallel.model_fields[field].default is None):
            parts.append(f"{axis}{size}")
    if parallel.context_parallel_size > 1 and parallel.context_parallel_exchange in _EXCHANGES:
        parts.append(_EXCHANGES[parallel.context_parallel_exchange])
    if num_ranks > _fewest_ranks(parallel):
        parts.append(f"dp{num_ranks // _model_ranks(parallel)}")
    for word in ("sp", "do", "ov"):
        if all(getattr(parallel, field) == value for field, value in _WORDS[word].items()):
            parts.append(word)
    return "".join(parts) or ONE_RANK


def check_layouts(layouts: Sequence[Layout], recipe: RunRecipe) -> None:
    """Raise ``RecipeError`` listing what stops each layout that the recipe does not admit."""
    lines = []
    for layout in layouts:
        if problems := _problems(layout, recipe):
            said = str(refusal(problems)).replace("\n", "\n  ")
            near = _nearest(layout, recipe)
            hint = f"\n  layouts that fit, nearest first: {', '.join(near)}" if near else ""
            lines.append(f"layout {layout.name}: {said}{hint}")
    if lines:
        raise RecipeError("\n".join(lines))


def _problems(layout: Layout, recipe: RunRecipe) -> list[Problem]:
    """Why the recipe cannot run on this layout; empty when it can."""
    moved = layout.recipe(recipe)
    if problems := recipe_problems(moved) or rank_problems(moved, layout.num_ranks):
        return problems
    if not isinstance(recipe, Recipe):
        return []
    multiple, tp = (
        recipe.model.make_vocab_size_divisible_by,
        layout.parallel.tensor_model_parallel_size,
    )
    if multiple % tp == 0:
        return []
    return [
        Problem(
            ("model", "make_vocab_size_divisible_by"),
            f"found {multiple}; tensor {tp} does not divide it, so the vocabulary would be padded "
            f"to that of another model; set it to {math.lcm(multiple, tp)}",
        )
    ]


def _nearest(layout: Layout, recipe: RunRecipe) -> list[str]:
    """Names of the layouts most like this one that the recipe admits, nearest first."""
    moved = layout.recipe(recipe)
    names = []
    for world_size in (layout.num_ranks, None):
        for arguments in nearest_layouts(moved, world_size):
            settings = dict(argument.removeprefix("parallel.").split("=") for argument in arguments)
            parallel = layout.parallel.model_copy(
                update={field: json.loads(value) for field, value in settings.items()}
            )
            num_ranks = world_size or _fewest_ranks(parallel)
            near = Layout(name_of(parallel, num_ranks), parallel, num_ranks)
            if near.name not in names and not _problems(near, recipe):
                names.append(near.name)
    return names[:MOST]


def _settings_of(name: str) -> Iterator[tuple[str, Any]]:
    """(field of the recipe's ``parallel`` or "dp", value) of every part of the name."""
    if name == ONE_RANK:
        return
    text = name.replace("-", "").replace("_", "")
    place = 0
    while place < len(text):
        match = _PART.match(text, place)
        if match is None:
            raise RecipeError(
                f"layout {name!r}: {text[place:]!r} means nothing; write one such as {_EXAMPLES}"
            )
        place = match.end()
        if match["axis"]:
            yield _SIZES.get(match["axis"], "dp"), int(match["size"])
        else:
            yield from _WORDS[match["word"]].items()
    if not text:
        raise RecipeError(f"layout {name!r}: no name; write one such as {_EXAMPLES}")


def _model_ranks(parallel: Parallel) -> int:
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _fewest_ranks(parallel: Parallel) -> int:
    """The fewest ranks that hold the layout: experts may ask for data parallelism."""
    pp, ep = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    if ep == 1:
        return _model_ranks(parallel)
    return math.lcm(_model_ranks(parallel), ep * parallel.expert_tp_size * pp)
