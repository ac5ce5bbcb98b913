"""Rules that hold between sections of a recipe, and between a recipe and a number of ranks.

Everything that is wrong is found in one pass; each problem names the value that would work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import lcm

from megatron_curr.recipe.batch_rules import batches, pieces_of
from megatron_curr.recipe.layout_rules import layout_problems, rank_problems
from megatron_curr.recipe.nearest_layouts import refuse_layout
from megatron_curr.recipe.phases import MixturePiece, Piece, RunPhase
from megatron_curr.recipe.problems import Problem, did_you_mean, refusal
from megatron_curr.recipe.schema import Recipe, RunRecipe
from megatron_curr.recipe.video_phases import TASKS
from megatron_curr.recipe.video_rules import video_problems
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.recipe.wording import either, phase_path
from megatron_curr.recipe.yaml_lines import Path

CURVES = ("mixture", "global_batch_tokens", "learning_rate", "weight_decay")
VIDEO_CURVES = (*CURVES, "buckets", "tasks", "timestep_shift")
_LAYOUT = "parallel"


def check_recipe(recipe: RunRecipe) -> None:
    """Raises ``RecipeError`` that lists every rule the recipe breaks, whatever the ranks."""
    if problems := recipe_problems(recipe):
        raise refuse_layout(recipe, problems) if layout_problems(recipe) else refusal(problems)


def check_layout(recipe: RunRecipe, world_size: int) -> None:
    """Raises ``RecipeError`` when this many ranks cannot run the recipe's layout and batches."""
    if problems := rank_problems(recipe, world_size):
        raise refuse_layout(recipe, problems, world_size=world_size)


def recipe_problems(recipe: RunRecipe) -> list[Problem]:
    """Every rule the recipe breaks; empty for a sound one."""
    shared = (_phase_names, _first_phase, _weight_names, _rates, _pieces, layout_problems)
    problems = [problem for rule in shared for problem in rule(recipe)]
    if isinstance(recipe, Recipe):
        for text_rule in (_sequence_lengths, batches, _evaluation_window):
            problems += text_rule(recipe)
    if isinstance(recipe, VideoRecipe):
        problems += video_problems(recipe)
    return problems


def _curves_of(recipe: RunRecipe) -> tuple[str, ...]:
    return VIDEO_CURVES if isinstance(recipe, VideoRecipe) else CURVES


def _phase_names(recipe: RunRecipe) -> Iterator[Problem]:
    first_with: dict[str, int] = {}
    for index, phase in enumerate(recipe.curriculum.phases):
        if phase.name in first_with:
            yield Problem(
                phase_path(index, "name"),
                f"{phase.name!r} is the name of phase {first_with[phase.name]} already; "
                f"give every phase a name of its own",
            )
        first_with.setdefault(phase.name, index)


def _first_phase(recipe: RunRecipe) -> Iterator[Problem]:
    first = recipe.curriculum.phases[0]
    for curve in _curves_of(recipe):
        if getattr(first, curve) is None:
            yield Problem(
                phase_path(0, curve), "missing; the first phase has no value to hold, so give one"
            )
        pieces = list(pieces_of(first, curve))
        if pieces and pieces[0][1].from_ is None:
            yield Problem(
                phase_path(0, *pieces[0][0]),
                "a ramp without 'from'; the first phase has no value to start at, so add 'from'",
            )


def _weight_names(recipe: RunRecipe) -> Iterator[Problem]:
    """Weights are of things that the recipe has."""
    tables: dict[str, tuple[str, Sequence[str]]] = {}
    if isinstance(recipe, Recipe | VideoRecipe):
        tables["mixture"] = "source in data.sources", list(recipe.data.sources)
    if isinstance(recipe, VideoRecipe):
        tables["buckets"] = "bucket in data.buckets", list(recipe.data.buckets)
        tables["tasks"] = "task", TASKS
    for curve, (what, known) in tables.items():
        for index, phase in enumerate(recipe.curriculum.phases):
            for path, weights in _weights_of(phase, curve):
                for name in weights:
                    if name not in known:
                        yield Problem(
                            phase_path(index, *path, name),
                            f"no such {what}; "
                            f"{did_you_mean(name, known, what=f'{what.split()[0]}s')}",
                        )


def _weights_of(phase: RunPhase, curve: str) -> Iterator[tuple[Path, dict[str, float]]]:
    """Every table of weights of a curve, each with its path inside the phase."""
    entry = getattr(phase, curve)
    if isinstance(entry, dict):
        yield (curve,), entry
    for path, piece in pieces_of(phase, curve):
        assert isinstance(piece, MixturePiece)
        yield (*path, "from"), piece.from_ or {}
        yield (*path, "to"), piece.to


def _rates(recipe: RunRecipe) -> Iterator[Problem]:
    for index, phase in enumerate(recipe.curriculum.phases):
        for curve in ("learning_rate", "weight_decay", "timestep_shift"):
            if curve not in type(phase).model_fields:
                continue
            entry = getattr(phase, curve)
            values: list[tuple[Path, float | None]] = []
            if isinstance(entry, float):
                values.append(((curve,), entry))
            for path, piece in pieces_of(phase, curve):
                assert isinstance(piece, Piece)
                values += [((*path, "from"), piece.from_), ((*path, "to"), piece.to)]
            for path, value in values:
                if value is not None and value < 0:
                    yield Problem(phase_path(index, *path), f"found {value}; must be 0 or more")


def _pieces(recipe: RunRecipe) -> Iterator[Problem]:
    for index, phase in enumerate(recipe.curriculum.phases):
        for curve in _curves_of(recipe):
            yield from _pieces_fit(index, phase, curve)


def _pieces_fit(index: int, phase: RunPhase, curve: str) -> Iterator[Problem]:
    pieces = list(pieces_of(phase, curve))
    for path, piece in pieces[:-1]:
        if piece.over is None:
            yield Problem(
                phase_path(index, *path),
                "missing 'over'; only the last piece may take the rest of the phase, so add it",
            )
    given = sum(piece.over for _, piece in pieces if piece.over is not None)
    open_ended = bool(pieces) and pieces[-1][1].over is None
    if given > phase.tokens:
        yield Problem(
            phase_path(index, curve),
            f"its pieces go over {given:_} tokens but the phase has {phase.tokens:_}; shorten them "
            f"by {given - phase.tokens:_}, or set the phase's tokens to {given:_}",
        )
    elif open_ended and given == phase.tokens:
        yield Problem(
            phase_path(index, curve),
            f"the last piece has no 'over' and the others take all {given:_} tokens of the phase; "
            f"shorten them, or drop it",
        )


def _sequence_lengths(recipe: Recipe) -> Iterator[Problem]:
    lengths = [phase.seq_length for phase in recipe.curriculum.phases]
    limit, micro = recipe.model.max_position_embeddings, recipe.parallel.micro_batch_tokens
    chunk, chunk_name = recipe.data.chunk_tokens, "data.chunk_tokens"
    if chunk is None:
        chunk, chunk_name = (
            max(lengths),
            "the longest seq_length (the default of data.chunk_tokens)",
        )
    whole = lcm(*lengths)
    for index, length in enumerate(lengths):
        path = phase_path(index, "seq_length")
        if length > limit:
            yield Problem(
                path,
                f"found {length:_}; use at most model.max_position_embeddings, {limit:_}, "
                f"or set that to {length:_}",
            )
        if chunk % length:
            yield Problem(
                path,
                f"found {length:_}; it does not divide {chunk_name}, {chunk:_}; "
                f"set data.chunk_tokens to {either(max(chunk, whole), whole)}",
            )
    if micro % whole:
        lacking = sorted({length for length in lengths if micro % length})
        yield Problem(
            (_LAYOUT, "micro_batch_tokens"),
            f"found {micro:_}; must be a multiple of every seq_length, and is not of "
            f"{', '.join(f'{length:_}' for length in lacking)}; use {either(micro, whole)}",
        )


def _evaluation_window(recipe: Recipe) -> Iterator[Problem]:
    longest = max(phase.seq_length for phase in recipe.curriculum.phases)
    if recipe.evaluation.tokens_per_source < longest:
        yield Problem(
            ("evaluation", "tokens_per_source"),
            f"found {recipe.evaluation.tokens_per_source:_}; holds no sequence of {longest:_} "
            f"tokens; use {longest:_} or more",
        )
