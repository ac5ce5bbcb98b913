"""The layouts nearest to one that does not fit, as arguments ready for the command line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import product
from math import gcd, lcm, log2

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.layout_rules import layout_problems, rank_problems
from megatron_curr.recipe.parallel import Parallel
from megatron_curr.recipe.problems import Problem, refusal
from megatron_curr.recipe.schema import Recipe, RunRecipe
from megatron_curr.recipe.wording import divisors_of
from megatron_curr.recipe.yaml_lines import Path

MOST = 3
HEADING = "layouts that fit, nearest first:"
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "virtual_pipeline_model_parallel_size",
)
_UNEVEN = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_FEWEST_RANKS_TRIED = 64  # of one axis, where the number of ranks is not known


def nearest_layouts(
    recipe: RunRecipe, world_size: int | None = None, *, most: int = MOST
) -> list[list[str]]:
    """For each layout that fits, nearest first, the ``parallel.key=value`` that lead to it.

    Near means few doublings and halvings of axes; among equals, as many ranks to a model as before.
    Without ``world_size`` the ranks may be any that hold the model, and batches are not looked at.
    """
    found: list[list[str]] = []
    for changes in _by_distance(recipe, world_size):
        parallel = recipe.parallel.model_copy(update=changes)
        moved = recipe.model_copy(update={"parallel": parallel})
        if layout_problems(moved) or (world_size and rank_problems(moved, world_size)):
            continue
        arguments = _arguments(recipe.parallel, parallel)
        if arguments and arguments not in found:
            found.append(arguments)
        if len(found) == most:
            break
    return found


def refuse_layout(
    recipe: RunRecipe,
    problems: Iterable[Problem],
    places: Mapping[Path, str] | None = None,
    *,
    world_size: int | None = None,
) -> RecipeError:
    """The error that lists the problems and the nearest layouts without them."""
    said = str(refusal(problems, places))
    near = nearest_layouts(recipe, world_size)
    lines = [" ".join(f"--set {argument}" for argument in arguments) for arguments in near]
    return RecipeError("\n".join([said, *([HEADING] if lines else []), *(f"  {x}" for x in lines)]))


def _by_distance(
    recipe: RunRecipe, world_size: int | None
) -> Iterator[dict[str, int | bool | None]]:
    """Changed settings of every layout whose sizes could fit, nearest first."""
    old = recipe.parallel
    was = [getattr(old, name) or 1 for name in _SIZES]
    was[4] = old.expert_tp_size
    ranked = []
    for sizes in product(*_choices(recipe, world_size)):
        tp, pp, cp, ep, etp, _ = sizes
        if world_size and world_size % lcm(tp * pp * cp, ep * etp * pp):
            continue
        doublings = [abs(log2(new / before)) for new, before in zip(sizes, was, strict=True)]
        model_ranks = abs(log2((tp * pp * cp) / (was[0] * was[1] * was[2])))
        uneven = bool(recipe.model.num_layers % pp) / 2
        ranked.append((sum(doublings) + model_ranks / 4 + uneven, doublings, sizes))
    for _, _, sizes in sorted(ranked):
        yield _settings(recipe, sizes)


def _choices(recipe: RunRecipe, world_size: int | None) -> list[list[int]]:
    """Sizes worth trying, for each of ``_SIZES``."""
    model, old = recipe.model, recipe.parallel
    limit = world_size or max(
        _FEWEST_RANKS_TRIED, old.tensor_model_parallel_size, old.pipeline_model_parallel_size
    )
    shortest = _context_unit(recipe)
    tensor = gcd(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    stages = {*divisors_of(model.num_layers), old.pipeline_model_parallel_size}
    experts = divisors_of(_num_experts(recipe))
    chunks = {1, old.virtual_pipeline_model_parallel_size or 1}
    if len(chunks) > 1:
        chunks |= set(divisors_of(model.num_layers))
    tp_sizes = [size for size in divisors_of(tensor) if _keeps_vocabulary(recipe, size)]
    cut_experts = tp_sizes if _num_experts(recipe) > 1 else [1]
    axes = [tp_sizes, stages, divisors_of(max(shortest // 2, 1)), experts, cut_experts, chunks]
    return [sorted(size for size in axis if size <= limit) or [1] for axis in axes]


def _context_unit(recipe: RunRecipe) -> int:
    """What twice a context size has to divide; sequences of video are padded to any."""
    if isinstance(recipe, Recipe):
        return gcd(*(phase.seq_length for phase in recipe.curriculum.phases))
    return _FEWEST_RANKS_TRIED


def _num_experts(recipe: RunRecipe) -> int:
    return (isinstance(recipe, Recipe) and recipe.model.num_moe_experts) or 1


def _keeps_vocabulary(recipe: RunRecipe, tp_size: int) -> bool:
    """Padded for this many ranks, the vocabulary has the rows it has for one rank."""
    if not isinstance(recipe, Recipe):
        return True
    return recipe.model.make_vocab_size_divisible_by % tp_size == 0


def _settings(recipe: RunRecipe, sizes: tuple[int, ...]) -> dict[str, int | bool | None]:
    """The settings that give these sizes, with what must go along."""
    model, old = recipe.model, recipe.parallel
    tp, pp, cp, _, etp, chunks = sizes
    changes: dict[str, int | bool | None] = dict(zip(_SIZES, sizes, strict=True))
    changes["virtual_pipeline_model_parallel_size"] = chunks if chunks > 1 and pp > 1 else None
    has_experts = _num_experts(recipe) > 1
    is_default = etp == tp or not has_experts
    changes["expert_tensor_parallel_size"] = None if is_default else etp
    changes["sequence_parallel"] = tp > 1 and (old.sequence_parallel or has_experts)
    if cp != old.context_parallel_size:
        changes["hierarchical_context_parallel_sizes"] = None
    is_uneven = any(getattr(old, name) for name in _UNEVEN)
    if pp != old.pipeline_model_parallel_size:
        changes |= dict.fromkeys(_UNEVEN)
    elif model.num_layers % pp and not is_uneven:
        changes["num_layers_in_last_pipeline_stage"] = _last_stage(model.num_layers, pp)
    return changes


def _last_stage(num_layers: int, num_stages: int) -> int | None:
    """Layers of the last stage, nearest to those of the others, which hold equally many."""
    sizes = {
        others: num_layers - others * (num_stages - 1)
        for others in (-(-num_layers // num_stages), num_layers // num_stages)
    }
    fits = {others: last for others, last in sizes.items() if others > 0 and last > 0}
    return min(fits.values(), key=lambda last: abs(last - num_layers / num_stages), default=None)


def _arguments(old: Parallel, new: Parallel) -> list[str]:
    """What has changed, as ``--set`` takes it."""
    words = {None: "null", True: "true", False: "false"}
    changed = {
        name: value
        for name in Parallel.model_fields
        if (value := getattr(new, name)) != getattr(old, name)
    }
    return [
        f"parallel.{name}={words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in changed.items()
    ]
