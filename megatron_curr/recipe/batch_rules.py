"""Global batches are whole sequences, whole micro-batches, and whole rounds of the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from math import lcm

from megatron_curr.recipe.phases import BatchPiece, MixturePiece, Piece, RunPhase
from megatron_curr.recipe.problems import Problem
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.wording import phase_path, use
from megatron_curr.recipe.yaml_lines import Path


def pieces_of(
    phase: RunPhase, curve: str
) -> Iterator[tuple[Path, Piece | BatchPiece | MixturePiece]]:
    """The pieces of one curve, each with its path inside the phase; none for a plain value."""
    entry = getattr(phase, curve)
    if isinstance(entry, list):
        yield from (((curve, index), piece) for index, piece in enumerate(entry))
    elif isinstance(entry, Piece | BatchPiece | MixturePiece):
        yield (curve,), entry


def batch_values(recipe: Recipe) -> Iterator[tuple[Path, int, int, bool]]:
    """(path, tokens, phase index, inherited) of every value that fixes the batches of a phase.

    A ramp is whole where its ends and its increment are. A value that a phase inherits is listed
    for that phase too, at the path of the phase, because its seq_length may be another.
    """
    held: int | None = None
    for index, phase in enumerate(recipe.curriculum.phases):
        entry = phase.global_batch_tokens
        if isinstance(entry, int):
            yield phase_path(index, "global_batch_tokens"), entry, index, False
            held = entry
        elif entry is None and held is not None:
            yield phase_path(index), held, index, True
        for path, piece in pieces_of(phase, "global_batch_tokens"):
            assert isinstance(piece, BatchPiece)
            if piece.from_ is not None:
                yield phase_path(index, *path, "from"), piece.from_, index, False
            elif held is not None:
                yield phase_path(index, *path), held, index, True
            yield phase_path(index, *path, "increment"), piece.increment, index, False
            yield phase_path(index, *path, "to"), piece.to, index, False
            held = piece.to


def batches(recipe: Recipe) -> Iterator[Problem]:
    """Every batch is a whole number of sequences and of micro-batches."""
    micro = recipe.parallel.micro_batch_tokens
    for path, value, index, inherited in batch_values(recipe):
        length = recipe.curriculum.phases[index].seq_length
        # A micro-batch that is wrong itself is reported by its own rule, and is no guide here.
        unit = lcm(length, micro) if micro % length == 0 else length
        subject = f"a batch of {value:_} tokens is inherited" if inherited else f"found {value:_}"
        if value % length:
            yield Problem(
                path, f"{subject}; must be a multiple of seq_length {length:_}, {use(value, unit)}"
            )
        elif value % unit:
            yield Problem(
                path,
                f"{subject}; must be a multiple of parallel.micro_batch_tokens {micro:_}, "
                f"{use(value, unit)}",
            )


def batches_over_ranks(recipe: Recipe, dp_size: int) -> Iterator[Problem]:
    """Every batch is a whole number of micro-batches for each of the data-parallel ranks."""
    parallel = recipe.parallel
    pp = parallel.pipeline_model_parallel_size
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    unit = parallel.micro_batch_tokens * dp_size * (pp if interleaved else 1)
    reason = f"{parallel.micro_batch_tokens:_} tokens a micro-batch x {dp_size} data-parallel ranks"
    if interleaved:
        reason += f" x {pp} pipeline stages (an interleaved pipeline takes them in whole rounds)"
    for path, value, _, _ in batch_values(recipe):
        if value % unit:
            yield Problem(
                path,
                f"found {value:_}; must be a multiple of {unit:_} ({reason}), {use(value, unit)}",
            )
