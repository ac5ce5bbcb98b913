"""Which data a run reads, told by what is in its files, and that no file is read as two things.

A file with a manifest beside it is known by the sha256 there, which costs nothing. One without is
known by its size and by blocks of it and of its index, both ends and two between: another order of
the documents is seen, a change that keeps every size and lies between the blocks is not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_curr.data.idx_format import bin_path, file_bytes, idx_path, masked_path
from megatron_curr.data.shards import Shard, ShardSet
from megatron_curr.data.tokenizer import Tokenizer, load_tokenizer
from megatron_curr.data.video_shards import VideoShards
from megatron_curr.errors import CheckpointError, DataError

FILE_NAME = "data.json"
NUM_BLOCKS, BLOCK_BYTES = 4, 16 << 10
SHA256, BLOCKS = "sha256:", "blocks:"

AnyShards = ShardSet | VideoShards


@dataclass(frozen=True, slots=True)
class DataFile:
    """A ``.bin`` or a tar. ``content`` is of the file alone, None where no manifest tells."""

    path: Path
    num_bytes: int
    content: str | None
    digest: str  # of all that decides what is read: the index and the mask, too
    beside: tuple[Path, ...] = ()  # index and mask

    def same_as(self, known: str) -> bool:
        """Whether a digest of before is of this file, whichever way it was told then."""
        if known.startswith(BLOCKS) and self.digest.startswith(SHA256) and self.beside:
            return known == _digest_of_blocks((self.path, *self.beside))
        return known == self.digest


Files = Mapping[str, Sequence[DataFile]]
"""By place: ``<source>.shards`` and ``<source>.heldout``, in reading order."""


@dataclass(frozen=True, slots=True)
class KnownData:
    """What a run folder says of the data that the run reads."""

    tokenizer: str | None  # sha256
    digests: Mapping[str, tuple[str, ...]]  # by place, one a file

    def text(self) -> str:
        """As it stands in ``data.json``."""
        return json.dumps({"tokenizer": self.tokenizer, "digests": self.digests}, indent=1) + "\n"

    def with_others(self, other: KnownData) -> KnownData:
        """With the places of another, where this one has none of that name."""
        return KnownData(self.tokenizer, {**other.digests, **self.digests})


def known_of(files: Files, tokenizer: str | None) -> KnownData:
    """What to write down of some files."""
    return KnownData(
        tokenizer, {place: tuple(file.digest for file in found) for place, found in files.items()}
    )


def read_known(run_folder: Path) -> KnownData | None:
    """What the run began with; None for a run that did not write it down."""
    path = run_folder / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        digests = {place: tuple(found) for place, found in values["digests"].items()}
        return KnownData(values["tokenizer"], digests)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error!r}); restore it, or remove it to go on with the data "
            "as it is now"
        ) from None


def files_of(train: Mapping[str, AnyShards], heldout: Mapping[str, AnyShards]) -> Files:
    """Every file that the sources read, by place."""
    return {
        **{f"{name}.shards": tuple(_files_in(shards)) for name, shards in sorted(train.items())},
        **{f"{name}.heldout": tuple(_files_in(shards)) for name, shards in sorted(heldout.items())},
    }


def check_unchanged(known: KnownData, found: Files, *, remedy: str) -> None:
    """Raise ``CheckpointError`` where a place does not hold the files that it held before.

    Places that only one of the two has are passed over.
    """
    for place, files in found.items():
        before = known.digests.get(place)
        if before is None:
            continue
        what = _first_change(before, files)
        if what is None and len(files) != len(before):
            what = f"there were {len(before):,} and are {len(files):,}"
        if what is not None:
            raise CheckpointError(
                f"data.sources.{place}: not the files that the run began with: {what}, so samples "
                f"would not be those planned; {remedy}"
            )


def _first_change(before: Sequence[str], files: Sequence[DataFile]) -> str | None:
    for number, (known, file) in enumerate(zip(before, files, strict=False), start=1):
        if not file.same_as(known):
            if known.startswith(SHA256) and file.digest.startswith(BLOCKS):
                return f"{file.path} has no manifest beside it any more, whose sha256 is known"
            return f"{file.path}, {number:,} of {len(files):,}, is another"
    return None


def check_tokenizer_unchanged(known: KnownData, sha256: str | None, *, remedy: str) -> None:
    """Raise ``CheckpointError`` where a tokenizer is not the one the run began with."""
    if known.tokenizer is not None and sha256 is not None and known.tokenizer != sha256:
        raise CheckpointError(
            f"data.tokenizer: sha256 {sha256[:16]}, but the run began with "
            f"{known.tokenizer[:16]}: its ids mean other text now; {remedy}"
        )


def load_tokenizer_of(run_folder: Path, path: str) -> Tokenizer:
    """The tokenizer at ``path``. Raises ``CheckpointError`` where the run began with another."""
    tokenizer = load_tokenizer(path)
    known = read_known(run_folder)
    if known is not None:
        remedy = f"put back what was there at {tokenizer.path}"
        check_tokenizer_unchanged(known, tokenizer.sha256, remedy=remedy)
    return tokenizer


def check_separate(files: Files) -> None:
    """Raise ``DataError`` where a file is read twice: by its own name, by a link, or as a copy.

    Places that are both held out may share files; copies inside one place are its own affair.
    """
    for is_copy, key in ((False, _inode), (True, _content_key(files))):
        first: dict[object, tuple[str, DataFile]] = {}
        pairs: defaultdict[tuple[str, str], list[tuple[DataFile, DataFile]]] = defaultdict(list)
        for place, file in _in_order(files):
            if (known := key(file)) is None:
                continue
            other, earlier = first.setdefault(known, (place, file))
            is_fine = other.endswith(".heldout") and place.endswith(".heldout")
            if earlier is not file and not is_fine and not (is_copy and other == place):
                pairs[other, place].append((earlier, file))
        for places, found in pairs.items():
            raise DataError(_clash(*places, found, is_copy=is_copy))


def _clash(
    one: str, other: str, pairs: Sequence[tuple[DataFile, DataFile]], *, is_copy: bool
) -> str:
    earlier, file = pairs[0]
    shown = str(file.path)
    if earlier.path != file.path:
        shown = f"{earlier.path} and {file.path}, which are {'copies' if is_copy else 'one file'}"
    if len(pairs) > 1:
        shown += f" (and {len(pairs) - 1:,} more)"
    if one == other:
        return (
            f"data.sources.{one} reads {shown}: one shard twice; take the link out of the folder, "
            "or narrow the glob"
        )
    both = f"data.sources.{one} and data.sources.{other} both read {shown}"
    if other.endswith(".heldout"):
        return (
            f"{both}: what is held out would be trained on, and its loss would say nothing; give "
            "heldout a folder of its own, as preprocess makes one, or leave it out"
        )
    return (
        f"{both}: its documents would be read as two sources, more often than max_epochs says; "
        "take one of the two out, or narrow its glob"
    )


def _in_order(files: Files) -> Iterator[tuple[str, DataFile]]:
    """Training before held out, so that a clash is told of the held-out side."""
    for place in sorted(files, key=lambda place: (place.endswith(".heldout"), place)):
        for file in files[place]:
            yield place, file


def _inode(file: DataFile) -> object:
    found = os.stat(file.path)
    return found.st_dev, found.st_ino


def _content_key(files: Files) -> Callable[[DataFile], object]:
    """What copies have in common. Blocks are read where sizes agree and a sha256 is missing."""
    by_size: defaultdict[int, list[DataFile]] = defaultdict(list)
    for _, file in _in_order(files):
        by_size[file.num_bytes].append(file)

    def key(file: DataFile) -> object:
        alike = by_size[file.num_bytes]
        if file.num_bytes == 0 or len(alike) == 1:
            return None
        if all(other.content for other in alike):
            return file.content
        return file.num_bytes, _digest_of_blocks((file.path,))

    return key


def _files_in(shards: AnyShards) -> Iterator[DataFile]:
    if isinstance(shards, VideoShards):
        manifest = shards.manifest
        for tar in manifest.tars:
            digest = SHA256 + _sha256_of(tar.sha256, manifest.index_sha256)
            yield DataFile(shards.folder / tar.name, tar.num_bytes, tar.sha256, digest)
        return
    yield from map(_file_of, shards.shards)


def _file_of(shard: Shard) -> DataFile:
    path, record = bin_path(shard.prefix), shard.record
    masked = (masked_path(shard.prefix),) if shard.has_masked else ()
    beside = (idx_path(shard.prefix), *masked)
    if record is None:
        digest = _digest_of_blocks((path, *beside))
        return DataFile(path, file_bytes(path), None, digest, beside)
    digest = SHA256 + _sha256_of(record.bin_sha256, record.idx_sha256, record.masked_sha256)
    return DataFile(path, record.bin_bytes, record.bin_sha256, digest, beside)


def _sha256_of(*parts: str) -> str:
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def _digest_of_blocks(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        num_bytes = file_bytes(path)
        digest.update(f"{num_bytes}/".encode())
        with path.open("rb", buffering=0) as stream:
            last = max(num_bytes - BLOCK_BYTES, 0)
            for number in range(NUM_BLOCKS):
                at = last * number // (NUM_BLOCKS - 1)
                digest.update(os.pread(stream.fileno(), BLOCK_BYTES, at))
    return BLOCKS + digest.hexdigest()
