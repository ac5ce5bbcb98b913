"""Everything that can be known wrong before a process is started or a byte is written. No torch.

The launching process runs this to refuse bad input once, with one message; every rank runs it
again to get the same objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec

from megatron_curr.curriculum.ledger import Entry, ledger_schedule
from megatron_curr.curriculum.schedule import Schedule
from megatron_curr.data.identity import AnyShards, KnownData, check_separate, files_of, known_of
from megatron_curr.data.order import SampleOrder
from megatron_curr.data.sentencepiece_model import publishing_warning
from megatron_curr.data.shards import ShardSet, check_vocabulary, open_shards
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.data.video_data import build_video_order, open_video_data
from megatron_curr.data.video_order import VideoOrder
from megatron_curr.data.video_shards import VideoShards
from megatron_curr.data.windows import probe_vocabulary
from megatron_curr.errors import DataError, RecipeError
from megatron_curr.recipe.check import check_layout, check_recipe
from megatron_curr.recipe.load import Difference
from megatron_curr.recipe.schema import Recipe, RunRecipe
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.run_folder import RunFolder


@dataclass(frozen=True)
class Prepared:
    """A run that may start: its plan and its opened data."""

    recipe: Recipe | VideoRecipe
    folder: RunFolder
    ledger: tuple[Entry, ...]
    order: SampleOrder | VideoOrder
    shard_sets: dict[str, ShardSet] | dict[str, VideoShards]
    heldout_sets: dict[str, ShardSet] | dict[str, VideoShards]
    vocab_size: int  # 0 for video
    changes: list[Difference]  # against the recipe of the last start, all allowed
    encoders: dict[str, str] | None = None  # of video, digests of what made latents and texts
    warnings: tuple[str, ...] = ()  # what is no fault, and is better known before than after
    data: KnownData | None = None  # what to write down of it; None where nobody has looked
    is_of_before_amendment: bool = False  # the recipe was given as it was before the last one

    @property
    def schedule(self) -> Schedule:
        """The curriculum as it will run; shorter than the recipe's where a source ends it."""
        return self.order.schedule


def prepare(
    recipe: Recipe | VideoRecipe,
    world_size: int,
    *,
    ledger: tuple[Entry, ...] | None = None,
    looks_at_data: bool = True,
) -> Prepared:
    """Check the recipe against ranks, data, tokenizer and run folder, and open what it needs.

    A ``ledger`` stands in the place of the folder's: what a run becomes by an amendment. Whether
    the files are those of before, and none is read as two things, one rank looks for all. Raises
    ``RecipeError``, ``DataError`` or ``CheckpointError``. Writes nothing.
    """
    folder, given = RunFolder(recipe.folder), recipe
    folder.check_checkpoints()
    if ledger is None:
        recipe = folder.under_ledger(given)
    check_recipe(recipe)
    check_layout(recipe, world_size)
    _check_extras(recipe)
    changes = folder.check_recipe(recipe) if ledger is None else []
    opened = _open_video if isinstance(recipe, VideoRecipe) else _open_text
    ledger = ledger or folder.read_ledger(recipe)
    prepared = opened(recipe, folder, ledger, changes, looks_at_data=looks_at_data)
    return replace(prepared, is_of_before_amendment=recipe is not given)


def _look_at_data(
    folder: RunFolder,
    train: Mapping[str, AnyShards],
    heldout: Mapping[str, AnyShards],
    *,
    tokenizer_sha256: str | None,
) -> KnownData:
    """What to write down of the data. Raises ``DataError`` or ``CheckpointError``."""
    files = files_of(train, heldout)
    check_separate(files)
    folder.check_data(files, tokenizer_sha256)
    return known_of(files, tokenizer_sha256)


def _open_text(
    recipe: Recipe,
    folder: RunFolder,
    ledger: tuple[Entry, ...],
    changes: list[Difference],
    *,
    looks_at_data: bool,
) -> Prepared:
    sources = recipe.data.sources
    shard_sets = {name: open_shards(source.shards, name=name) for name, source in sources.items()}
    heldout_sets = {
        name: open_shards(source.heldout, name=f"{name} (held out)")
        for name, source in sources.items()
        if source.heldout is not None
    }
    _check_bos([*shard_sets.values(), *heldout_sets.values()])
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    vocab_size = _vocab_size(recipe, tokenizer)
    for shard_set in (*shard_sets.values(), *heldout_sets.values()):
        _check_tokenizer(shard_set, tokenizer)
        check_vocabulary(shard_set, vocab_size)
        if shard_set.max_token_id is None:
            probe_vocabulary(shard_set, vocab_size)
    known = None
    if looks_at_data:
        sha256 = tokenizer.sha256
        known = _look_at_data(folder, shard_sets, heldout_sets, tokenizer_sha256=sha256)
    source_tokens = {name: shard_set.num_tokens for name, shard_set in shard_sets.items()}
    folder.check_sources(source_tokens)
    order = SampleOrder(
        ledger_schedule(ledger),
        source_tokens,
        seed=recipe.seed,
        sources=sources,
        chunk_tokens=recipe.data.chunk_tokens,
    )
    return Prepared(
        recipe=recipe,
        folder=folder,
        ledger=ledger,
        order=order,
        shard_sets=shard_sets,
        heldout_sets=heldout_sets,
        vocab_size=vocab_size,
        changes=changes,
        warnings=tuple(filter(None, [publishing_warning(tokenizer)])),
        data=known,
    )


def _open_video(
    recipe: VideoRecipe,
    folder: RunFolder,
    ledger: tuple[Entry, ...],
    changes: list[Difference],
    *,
    looks_at_data: bool,
) -> Prepared:
    data = open_video_data(recipe)
    known = None
    if looks_at_data:
        known = _look_at_data(folder, data.train, data.heldout, tokenizer_sha256=None)
    order = build_video_order(recipe, data, ledger)
    sizes = zip(order.sources, order.num_tokens.tolist(), strict=True)
    folder.check_sources(dict(sizes))
    encoders = next(iter(data.train.values())).manifest.encoders  # the same of all
    folder.check_encoders(encoders)
    return Prepared(
        recipe=recipe,
        folder=folder,
        ledger=ledger,
        order=order,
        shard_sets=data.train,
        heldout_sets=data.heldout,
        vocab_size=0,
        changes=changes,
        encoders=encoders,
        data=known,
    )


def _check_extras(recipe: RunRecipe) -> None:
    wanted = {
        "tensorboard": ("logging.tensorboard", recipe.logging.tensorboard),
        "wandb": ("logging.wandb_project", recipe.logging.wandb_project),
    }
    for package, (place, is_wanted) in wanted.items():
        if is_wanted and find_spec(package) is None:
            raise RecipeError(
                f"{place} is set but the package {package} is not installed; "
                f"pip install 'megatron_curr[{package}]', or take the setting out"
            )


def _check_tokenizer(shard_set: ShardSet, tokenizer: Tokenizer) -> None:
    """Raise ``DataError`` where a manifest says that another tokenizer made the shards."""
    for made in shard_set.tokenizers:
        if made.sha256 != tokenizer.sha256:
            raise DataError(
                f"{shard_set.name}: made with the tokenizer {made.name}, sha256 "
                f"{made.sha256[:16]}, but "
                f"data.tokenizer {tokenizer.path} has {tokenizer.sha256[:16]}: its ids mean other "
                "text; set data.tokenizer to the one that made the shards (model.vocab_size may be "
                "larger), or preprocess again"
            )


def _check_bos(shard_sets: Sequence[ShardSet]) -> None:
    """Raise ``DataError`` where the manifests say that some documents begin with a BOS and some do
    not: the model would learn both, and an export could follow only one."""
    found = {made.bos_ids: shards.name for shards in shard_sets for made in shards.tokenizers}
    if len(found) > 1:
        (one, first), (other, second) = list(found.items())[:2]
        raise DataError(
            f"{first}: documents begin with BOS ids {list(one)}, but those of {second} with "
            f"{list(other)}; preprocess one of them again with --bos yes or --bos no"
        )


def _vocab_size(recipe: Recipe, tokenizer: Tokenizer) -> int:
    """The model's, which may exceed the tokenizer's but not fall short of it."""
    tokenizer_size = tokenizer.vocab_size
    vocab_size = recipe.model.vocab_size or tokenizer_size
    if vocab_size < tokenizer_size:
        raise RecipeError(
            f"model.vocab_size={vocab_size} is smaller than the {tokenizer_size} pieces of "
            f"{recipe.data.tokenizer}; leave it out, or set it to {tokenizer_size} or more"
        )
    return vocab_size
