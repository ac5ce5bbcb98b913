"""Which files are to be read, and the caption of each.

An input is a video or image file, a folder of them, or a list: ``.jsonl``, ``.csv`` and
``.parquet`` with a column for the file and one for the caption, ``.txt`` with a path a line. A
folder with a list called ``captions`` is that list. Without a list, the caption stands beside the
file: the whole of ``NAME.txt``, or a field of ``NAME.json``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.video_decode import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from megatron_curr.errors import DataError

LIST_SUFFIXES = (".jsonl", ".csv", ".parquet")
MEDIA_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


@dataclass(frozen=True, slots=True)
class Item:
    """One file to read. ``caption`` is empty where there is none."""

    path: Path
    caption: str


def find_items(
    inputs: Sequence[Path], *, file_field: str = "file", caption_field: str = "caption"
) -> list[Item]:
    """Every file of the inputs, once, in their order; folders in the order of their paths.

    Raises ``DataError`` for an input that is not there, a list that cannot be read, or no file.
    """
    items: dict[Path, Item] = {}
    for source in inputs:
        for item in _items_of(source, file_field, caption_field):
            items.setdefault(item.path, item)
    if not items:
        names = ", ".join(map(str, inputs))
        raise DataError(
            f"{names}: no video or image in it; known endings are "
            f"{' '.join(sorted(MEDIA_SUFFIXES))}"
        )
    return list(items.values())


def _items_of(source: Path, file_field: str, caption_field: str) -> Iterator[Item]:
    if source.is_dir():
        lists = [source / f"captions{suffix}" for suffix in LIST_SUFFIXES]
        listed = next((path for path in lists if path.is_file()), None)
        if listed is not None:
            yield from _listed(listed, file_field, caption_field)
            return
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in MEDIA_SUFFIXES and path.is_file():
                yield Item(path, _beside(path, caption_field))
    elif not source.exists():
        raise DataError(f"{source}: not there; give videos, images, folders or lists of them")
    elif source.suffix in LIST_SUFFIXES:
        yield from _listed(source, file_field, caption_field)
    elif source.suffix == ".txt":
        for line in source.read_text(encoding="utf-8").splitlines():
            if line.strip():
                path = source.parent / line.strip()
                yield Item(path, _beside(path, caption_field))
    elif source.suffix.lower() in MEDIA_SUFFIXES:
        yield Item(source, _beside(source, caption_field))
    else:
        raise DataError(
            f"{source}: neither a video nor an image nor a list ({' '.join(LIST_SUFFIXES)} .txt)"
        )


def _listed(path: Path, file_field: str, caption_field: str) -> Iterator[Item]:
    """Rows of a list; paths are relative to its folder."""
    number = 0
    try:
        for number, row in enumerate(_rows(path), start=1):
            name = row.get(file_field)
            if not isinstance(name, str) or not name:
                raise DataError(
                    f"{path}, row {number}: no file in field {file_field!r}; it has "
                    f"{', '.join(row) or 'nothing'}: choose with --file-field"
                )
            media = path.parent / name
            caption = row.get(caption_field)
            yield Item(media, _tidy(caption) or _beside(media, caption_field))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{path}, after row {number}: cannot be read ({error})") from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches():
                yield from batch.to_pylist()
    elif path.suffix == ".csv":
        with open(path, encoding="utf-8", newline="") as stream:
            yield from csv.DictReader(stream)
    else:
        with open(path, encoding="utf-8") as stream:
            for line in stream:
                if line.strip():
                    row = json.loads(line)
                    yield row if isinstance(row, dict) else {}


def _beside(path: Path, caption_field: str) -> str:
    """The caption in a file of the same name, or nothing."""
    try:
        described = path.with_suffix(".json")
        if described.is_file():
            content = json.loads(described.read_text(encoding="utf-8"))
            return _tidy(content.get(caption_field) if isinstance(content, dict) else content)
        plain = path.with_suffix(".txt")
        return _tidy(plain.read_text(encoding="utf-8")) if plain.is_file() else ""
    except (OSError, ValueError):
        return ""  # counted as a file without a caption


def _tidy(caption: object) -> str:
    return " ".join(caption.split()) if isinstance(caption, str) else ""
