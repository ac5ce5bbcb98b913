"""Rules that hold between sections of a recipe, and between a recipe and a number of ranks.

Everything that is wrong is found in one pass; each problem names the value that would work.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd, lcm

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.problems import Problem, did_you_mean, refusal
from megatron_curr.recipe.schema import BatchPiece, MixturePiece, Phase, Piece, Recipe
from megatron_curr.recipe.yaml_lines import Path

CURVES = ("mixture", "global_batch_tokens", "learning_rate", "weight_decay")
_LAYOUT = "parallel"


def check_recipe(recipe: Recipe) -> None:
    """Raises ``RecipeError`` that lists every rule the recipe breaks, whatever the ranks."""
    if problems := recipe_problems(recipe):
        raise refusal(problems)


def check_layout(recipe: Recipe, world_size: int) -> None:
    """Raises ``RecipeError`` when this many ranks cannot run the recipe's layout and batches."""
    parallel = recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    if world_size < 1 or world_size % (tp * pp * cp):
        size = tp * pp * cp
        raise RecipeError(
            f"{_LAYOUT}: {world_size} ranks cannot hold tensor {tp} x pipeline {pp} x context {cp} "
            f"= {size} ranks; start {_either(world_size, size)} ranks, or change the layout"
        )
    dp = world_size // (tp * pp * cp)
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    unit = parallel.micro_batch_tokens * dp * (pp if interleaved else 1)
    reason = f"{parallel.micro_batch_tokens:_} tokens a micro-batch x {dp} data-parallel ranks"
    if interleaved:
        reason += f" x {pp} pipeline stages (an interleaved pipeline takes them in whole rounds)"
    problems = [
        Problem(
            path, f"found {value:_}; must be a multiple of {unit:_} ({reason}), {_use(value, unit)}"
        )
        for path, value, _, _ in _batch_values(recipe)
        if value % unit
    ]
    if problems:
        raise refusal(problems)


def recipe_problems(recipe: Recipe) -> list[Problem]:
    """Every rule the recipe breaks; empty for a sound one."""
    rules = (
        _phase_names,
        _first_phase,
        _mixture_sources,
        _rates,
        _pieces,
        _sequence_lengths,
        _batches,
        _tensor_split,
        _pipeline_split,
        _context_split,
        _evaluation_window,
    )
    return [problem for rule in rules for problem in rule(recipe)]


def _phase_path(index: int, *rest: str | int) -> Path:
    return ("curriculum", "phases", index, *rest)


def _either(value: int, unit: int) -> str:
    """The multiples of ``unit`` next to ``value``, nearest first."""
    below = value // unit * unit
    near = sorted({below, below + unit} - {0}, key=lambda multiple: abs(multiple - value))
    return " or ".join(f"{multiple:_}" for multiple in near)


def _use(value: int, unit: int) -> str:
    return f"such as {_either(value, unit)}"


def _divisors(number: int) -> str:
    """``1, 2 or 4``."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    every = [str(divisor) for divisor in sorted({*small, *(number // d for d in small)})]
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} or {every[-1]}"


def _pieces_of(
    phase: Phase, curve: str
) -> Iterator[tuple[Path, Piece | BatchPiece | MixturePiece]]:
    """The pieces of one curve, each with its path inside the phase; none for a plain value."""
    entry = getattr(phase, curve)
    if isinstance(entry, list):
        yield from (((curve, index), piece) for index, piece in enumerate(entry))
    elif isinstance(entry, Piece | BatchPiece | MixturePiece):
        yield (curve,), entry


def _phase_names(recipe: Recipe) -> Iterator[Problem]:
    first_with: dict[str, int] = {}
    for index, phase in enumerate(recipe.curriculum.phases):
        if phase.name in first_with:
            yield Problem(
                _phase_path(index, "name"),
                f"{phase.name!r} is the name of phase {first_with[phase.name]} already; "
                f"give every phase a name of its own",
            )
        first_with.setdefault(phase.name, index)


def _first_phase(recipe: Recipe) -> Iterator[Problem]:
    first = recipe.curriculum.phases[0]
    for curve in CURVES:
        if getattr(first, curve) is None:
            yield Problem(
                _phase_path(0, curve), "missing; the first phase has no value to hold, so give one"
            )
        pieces = list(_pieces_of(first, curve))
        if pieces and pieces[0][1].from_ is None:
            yield Problem(
                _phase_path(0, *pieces[0][0]),
                "a ramp without 'from'; the first phase has no value to start at, so add 'from'",
            )


def _mixture_sources(recipe: Recipe) -> Iterator[Problem]:
    known = list(recipe.data.sources)
    for index, phase in enumerate(recipe.curriculum.phases):
        named: list[tuple[Path, dict[str, float]]] = []
        if isinstance(phase.mixture, dict):
            named.append((("mixture",), phase.mixture))
        for path, piece in _pieces_of(phase, "mixture"):
            assert isinstance(piece, MixturePiece)
            named += [((*path, "from"), piece.from_ or {}), ((*path, "to"), piece.to)]
        for path, weights in named:
            for source in weights:
                if source not in recipe.data.sources:
                    yield Problem(
                        _phase_path(index, *path, source),
                        f"no such source in data.sources; "
                        f"{did_you_mean(source, known, what='sources')}",
                    )


def _rates(recipe: Recipe) -> Iterator[Problem]:
    for index, phase in enumerate(recipe.curriculum.phases):
        for curve in ("learning_rate", "weight_decay"):
            entry = getattr(phase, curve)
            values: list[tuple[Path, float | None]] = []
            if isinstance(entry, float):
                values.append(((curve,), entry))
            for path, piece in _pieces_of(phase, curve):
                assert isinstance(piece, Piece)
                values += [((*path, "from"), piece.from_), ((*path, "to"), piece.to)]
            for path, value in values:
                if value is not None and value < 0:
                    yield Problem(_phase_path(index, *path), f"found {value}; must be 0 or more")


def _pieces(recipe: Recipe) -> Iterator[Problem]:
    for index, phase in enumerate(recipe.curriculum.phases):
        for curve in CURVES:
            yield from _pieces_fit(index, phase, curve)


def _pieces_fit(index: int, phase: Phase, curve: str) -> Iterator[Problem]:
    pieces = list(_pieces_of(phase, curve))
    for path, piece in pieces[:-1]:
        if piece.over is None:
            yield Problem(
                _phase_path(index, *path),
                "missing 'over'; only the last piece may take the rest of the phase, so add it",
            )
    given = sum(piece.over for _, piece in pieces if piece.over is not None)
    open_ended = bool(pieces) and pieces[-1][1].over is None
    if given > phase.tokens:
        yield Problem(
            _phase_path(index, curve),
            f"its pieces go over {given:_} tokens but the phase has {phase.tokens:_}; shorten them "
            f"by {given - phase.tokens:_}, or set the phase's tokens to {given:_}",
        )
    elif open_ended and given == phase.tokens:
        yield Problem(
            _phase_path(index, curve),
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
        path = _phase_path(index, "seq_length")
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
                f"set data.chunk_tokens to {_either(max(chunk, whole), whole)}",
            )
    if micro % whole:
        lacking = sorted({length for length in lengths if micro % length})
        yield Problem(
            (_LAYOUT, "micro_batch_tokens"),
            f"found {micro:_}; must be a multiple of every seq_length, and is not of "
            f"{', '.join(f'{length:_}' for length in lacking)}; use {_either(micro, whole)}",
        )


def _batch_values(recipe: Recipe) -> Iterator[tuple[Path, int, int, bool]]:
    """(path, tokens, phase index, inherited) of every value that fixes the batches of a phase.

    A ramp is whole where its ends and its increment are. A value that a phase inherits is listed
    for that phase too, at the path of the phase, because its seq_length may be another.
    """
    held: int | None = None
    for index, phase in enumerate(recipe.curriculum.phases):
        entry = phase.global_batch_tokens
        if isinstance(entry, int):
            yield _phase_path(index, "global_batch_tokens"), entry, index, False
            held = entry
        elif entry is None and held is not None:
            yield _phase_path(index), held, index, True
        for path, piece in _pieces_of(phase, "global_batch_tokens"):
            assert isinstance(piece, BatchPiece)
            if piece.from_ is not None:
                yield _phase_path(index, *path, "from"), piece.from_, index, False
            elif held is not None:
                yield _phase_path(index, *path), held, index, True
            yield _phase_path(index, *path, "increment"), piece.increment, index, False
            yield _phase_path(index, *path, "to"), piece.to, index, False
            held = piece.to


def _batches(recipe: Recipe) -> Iterator[Problem]:
    micro = recipe.parallel.micro_batch_tokens
    for path, value, index, inherited in _batch_values(recipe):
        length = recipe.curriculum.phases[index].seq_length
        # A micro-batch that is wrong itself is reported by its own rule, and is no guide here.
        unit = lcm(length, micro) if micro % length == 0 else length
        subject = f"a batch of {value:_} tokens is inherited" if inherited else f"found {value:_}"
        if value % length:
            yield Problem(
                path, f"{subject}; must be a multiple of seq_length {length:_}, {_use(value, unit)}"
            )
        elif value % unit:
            yield Problem(
                path,
                f"{subject}; must be a multiple of parallel.micro_batch_tokens {micro:_}, "
                f"{_use(value, unit)}",
            )


def _tensor_split(recipe: Recipe) -> Iterator[Problem]:
    model, tp = recipe.model, recipe.parallel.tensor_model_parallel_size
    path = (_LAYOUT, "tensor_model_parallel_size")
    heads, groups = model.num_attention_heads, model.num_query_groups
    if heads % groups:
        yield Problem(
            ("model", "num_query_groups"),
            f"found {groups}; must divide num_attention_heads {heads}: use {_divisors(heads)}",
        )
    widths = {
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    indivisible = [f"model.{name} {width:_}" for name, width in widths.items() if width % tp]
    if indivisible:
        works = _divisors(gcd(*widths.values()))
        yield Problem(path, f"found {tp}; does not divide {' or '.join(indivisible)}; use {works}")
    if recipe.parallel.sequence_parallel and tp == 1:
        yield Problem(
            (_LAYOUT, "sequence_parallel"),
            "true needs tensor_model_parallel_size above 1; set it to false",
        )


def _pipeline_split(recipe: Recipe) -> Iterator[Problem]:
    layers, pp = recipe.model.num_layers, recipe.parallel.pipeline_model_parallel_size
    chunks = recipe.parallel.virtual_pipeline_model_parallel_size
    virtual_path = (_LAYOUT, "virtual_pipeline_model_parallel_size")
    if layers % pp:
        yield Problem(
            (_LAYOUT, "pipeline_model_parallel_size"),
            f"found {pp}; does not divide model.num_layers {layers}; use {_divisors(layers)}",
        )
    elif chunks is not None and pp > 1 and layers % (pp * chunks):
        yield Problem(
            virtual_path,
            f"found {chunks}; a stage has {layers // pp} of the {layers} layers, which it must "
            f"divide: use {_divisors(layers // pp)}",
        )
    if chunks is not None and pp == 1:
        yield Problem(
            virtual_path, "needs pipeline_model_parallel_size above 1; leave it out on one stage"
        )


def _context_split(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    unit = 2 * cp if cp > 1 else 1
    reason = f"2 x context_parallel_size {cp}"
    if parallel.sequence_parallel:
        unit = lcm(unit, cp * tp)
        reason += f" and of context x tensor size {cp * tp}, for sequence_parallel"
    for index, phase in enumerate(recipe.curriculum.phases):
        if phase.seq_length % unit:
            yield Problem(
                _phase_path(index, "seq_length"),
                f"found {phase.seq_length:_}; must be a multiple of {reason}, "
                f"{_use(phase.seq_length, unit)}",
            )


def _evaluation_window(recipe: Recipe) -> Iterator[Problem]:
    longest = max(phase.seq_length for phase in recipe.curriculum.phases)
    if recipe.evaluation.tokens_per_source < longest:
        yield Problem(
            ("evaluation", "tokens_per_source"),
            f"found {recipe.evaluation.tokens_per_source:_}; holds no sequence of {longest:_} "
            f"tokens; use {longest:_} or more",
        )
