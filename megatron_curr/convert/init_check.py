"""What ``init_from`` is compared for before a rank starts: what ``convert`` compares.

Settings and shapes (``load.py``), the tokenizer, whose ids the weights know as certain texts, and
the published model's logits, where both models are small enough to be asked in passing.
"""

from __future__ import annotations

from megatron_curr.convert.load import first_weights, open_first_source
from megatron_curr.convert.published import PublishedWeights
from megatron_curr.convert.source import Source
from megatron_curr.convert.tokenizer import HARD_TEXTS
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.errors import CheckpointError, DataError, RecipeError
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.video_schema import VideoRecipe

# Compared within seconds on a login node; a larger one is proven by `megatron-curr convert`.
_MOST_PARAMETERS = 1_000_000_000
_NUM_TOKENS = 128


def check_first_weights(recipe: Recipe | VideoRecipe, *, vocab_size: int) -> tuple[str, ...]:
    """Raise a ``UserError`` for weights or a tokenizer that do not fit; what else to know of them.

    Of a run that begins: one that goes on does not need them any more.
    """
    first_weights(recipe, vocab_size=vocab_size)
    source = None if isinstance(recipe, VideoRecipe) else open_first_source(recipe)
    if source is None:
        return ()
    assert isinstance(recipe, Recipe)
    told = [check_tokenizer(load_tokenizer(recipe.data.tokenizer), source)]
    if isinstance(source.weights, PublishedWeights):
        told.append(_proof(source))
    return tuple(filter(None, told))


def check_tokenizer(ours: Tokenizer, source: Source) -> str | None:
    """Raise ``RecipeError`` where an id means another text than the weights learned it for.

    The outcome is a warning where there is nothing to compare with, or where the ids are the same
    and texts are cut into others of them.
    """
    path = source.run.recipe.data.tokenizer if source.run else source.carried
    try:
        theirs = load_tokenizer(path) if path else None
    except DataError:
        theirs = None
    if theirs is None:
        return (
            f"warning: init_from: {source.path} has no tokenizer that can be read here, so "
            f"data.tokenizer {ours.path} was not compared with it"
        )
    if theirs.sha256 == ours.sha256:
        return None
    pieces = []
    special, known_special = ({i: t for t, i in x.special_tokens.items()} for x in (ours, theirs))
    for token in range(min(ours.vocab_size, theirs.vocab_size)):
        if token in special and token in known_special:  # a reserved one may get another name
            continue
        found = special.get(token) or _text(ours, token)
        known = known_special.get(token) or _text(theirs, token)
        if known != found:
            raise RecipeError(
                f"data.tokenizer {ours.path}: token {token} is {found!r}, and {known!r} in "
                f"{theirs.path}, with which the weights of init_from were trained; use that one, "
                "or one that adds to it, and preprocess with it"
            )
        pieces.append(known)
    texts = [*HARD_TEXTS, *(f"{text} {text}" for text in pieces)]
    for text, known, found in zip(
        texts, theirs.encode_batch(texts), ours.encode_batch(texts), strict=True
    ):
        if known != found:
            return (
                f"warning: data.tokenizer {ours.path} cuts texts in another way than "
                f"{theirs.path}, with which the weights of init_from were trained, such as "
                f"{text[:40]!r}: {found[:8]} where they know {known[:8]}"
            )
    return None


def _text(tokenizer: Tokenizer, token: int) -> str:
    """What a token means; nothing for an id that a tokenizer leaves out."""
    try:
        return tokenizer.decode([token])
    except KeyError:
        return ""


def _proof(source: Source) -> str:
    from megatron_curr.convert.verify import compare_first_weights, reason_not_to_verify

    family = source.family()
    num_parameters = sum(piece.num_values for piece in source.pieces(family))
    reason = reason_not_to_verify(
        source, num_parameters=num_parameters, architecture=family.architecture
    )
    if reason is None and num_parameters > _MOST_PARAMETERS:
        reason = f"{num_parameters:,} parameters take long"
    if reason is not None:
        return (
            f"init_from: {source.path} was not compared with transformers: {reason}; "
            f"`megatron-curr convert --verify` does"
        )
    agreement = compare_first_weights(source, num_tokens=_NUM_TOKENS)
    if not agreement.is_close:
        raise CheckpointError(
            f"{source.path}: with its weights our model is not the published one: {agreement}; "
            "`megatron-curr convert --verify` says the same; report it with the config"
        )
    return f"init_from: {source.path}: {agreement}"
