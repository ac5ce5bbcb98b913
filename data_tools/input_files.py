"""The files that a corpus is given by: files, folders to the bottom, globs, ``@list`` files.

In the order given, and inside a folder or glob sorted by name, whatever order the file system has.
What is passed over is said, and what may hide documents, such as a folder that may not be read, is
an error.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from data_tools.formats import FORMATS, KNOWN, format_of
from megatron_curr.errors import DataError

_GIVE = "give files, folders, globs or @list files"
_NAMED_SUFFIXES = 5


@dataclass(slots=True)
class InputFiles:
    """``passed_over`` counts by reason what lies in the folders and is not read."""

    files: list[Path] = field(default_factory=list)
    passed_over: Counter[str] = field(default_factory=Counter)


def find_files(inputs: Sequence[str | Path]) -> InputFiles:
    """The files that the inputs name. Raises ``DataError`` for what is not there or may not be
    read, for a link that leads nowhere, an unknown format, and a file that is named twice."""
    found = InputFiles()
    _real.cache_clear()
    for given in map(str, inputs):
        try:
            _add(given, found)
        except OSError as error:
            raise DataError(f"{given}: cannot be read ({error.strerror}); {_GIVE}") from error
        except RecursionError:
            raise DataError(f"{given}: a list that names itself, through others or not") from None
    if not found.files:
        names = ", ".join(map(str, inputs)) or "no input"
        raise DataError(f"{names}: no {KNOWN} file here{_told(found.passed_over)}; {_GIVE}")
    for file in found.files:
        _check_name(file)
    if len(inputs) > 1 or not Path(inputs[0]).is_dir():  # a folder has each file once
        _check_named_once(found.files)
    return found


def _add(given: str, found: InputFiles) -> None:
    path = Path(given)
    if given.startswith("@"):
        for line in _lines_of(Path(given[1:])):
            _add(line, found)
    elif path.is_dir():
        walk = _Walk(path)
        found.files += walk.files
        found.passed_over += walk.passed_over
    elif path.is_file():
        found.files.append(path)
    elif os.path.lexists(path):
        raise _no_file(path)
    elif glob.has_magic(given):
        found.files += _matches(given)
    else:
        raise DataError(f"{path}: no such file or folder; {_GIVE}")


def _lines_of(listing: Path) -> Iterable[str]:
    try:
        lines = listing.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{listing}: cannot be read as a list of files ({error})") from error
    return [line.strip() for line in lines if line.strip()]


def _matches(pattern: str) -> list[Path]:
    """The files of a glob, which itself says nothing of folders that it may not look into."""
    parts = Path(pattern).parts
    for count in range(1, len(parts)):
        if glob.has_magic(parts[count]):
            for folder in glob.glob(os.path.join(*parts[:count]), recursive=True):
                if os.path.isdir(folder):
                    _entries(Path(folder))
    paths = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if not path.is_dir()]
    for file in files:
        if not file.is_file():
            raise _no_file(file)
    if not files:
        raise DataError(f"{pattern}: no file matches this glob")
    return files


class _Walk:
    """Every file of a known kind below a folder, also through links, each folder once.

    Folders come before links to folders, so that where both lead to the same one, the link is what
    is passed over, wherever its name stands.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._walked = {os.path.realpath(top)}
        self._folders, self._links = [top], list[Path]()
        self._plain, self._linked = list[Path](), list[Path]()
        self._other: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()
        while folder := self._next_folder():
            entries = _entries(folder)
            self.passed_over["empty folders"] += not entries
            for entry in entries:
                try:
                    self._sort(entry, folder / entry.name)
                except OSError:
                    raise _no_file(folder / entry.name) from None
        self.files = sorted([*self._plain, *self._first_links()])
        self._count_others()

    def _next_folder(self) -> Path | None:
        while self._folders or self._links:
            if self._folders:
                return self._folders.pop()
            self._links.sort(reverse=True)
            link = self._links.pop()
            if Path(_real(str(self._top))).is_relative_to(_real(str(link))):
                self.passed_over["links to folders around them"] += 1
            elif self._is_new(link):
                return link
        return None

    def _is_new(self, folder: Path) -> bool:
        place = _place(folder)
        if place in self._walked:
            self.passed_over["links to folders that are read already"] += 1
            return False
        self._walked.add(place)
        return True

    def _sort(self, entry: os.DirEntry[str], path: Path) -> None:
        if entry.is_dir():
            if entry.is_symlink():
                self._links.append(path)
            elif self._is_new(path):
                self._folders.append(path)
        elif not entry.is_file():
            if entry.is_symlink() and not path.exists():
                raise _no_file(path)
            self.passed_over["pipes, sockets or devices"] += 1
        elif not entry.name.endswith(tuple(FORMATS)):
            self._other[path.suffix or "without suffix"] += 1
        else:
            (self._linked if entry.is_symlink() else self._plain).append(path)

    def _first_links(self) -> list[Path]:
        """Links to files that are not here under their own name, or under an earlier link's."""
        if not self._linked:
            return []
        places = set(map(_place, self._plain))
        kept = []
        for link in sorted(self._linked):
            if _place(link) not in places:
                kept.append(link)
                places.add(_place(link))
        self.passed_over["links to files that are read already"] += len(self._linked) - len(kept)
        return kept

    def _count_others(self) -> None:
        if self._other:
            order = sorted(self._other, key=lambda suffix: (-self._other[suffix], suffix))
            more = ", ..." if len(order) > _NAMED_SUFFIXES else ""
            names = f"{', '.join(order[:_NAMED_SUFFIXES])}{more}"
            self.passed_over[f"files of other kinds ({names})"] = self._other.total()
            if not self.files:
                raise DataError(
                    f"{self._top}: no {KNOWN} file in this folder{_told(self.passed_over)}; {_GIVE}"
                )


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be read ({error.strerror}), so what it holds would be lost; allow "
            "reading it, or name what is to be read by globs or an @list file"
        ) from error


def _no_file(path: Path) -> DataError:
    if path.is_symlink():
        return DataError(
            f"{path}: a link that leads nowhere (to {os.readlink(path)}), so what it stood for "
            "would be lost; bring that back, or remove the link"
        )
    return DataError(f"{path}: neither a file nor a folder but a pipe, socket or device; {_GIVE}")


def _check_name(file: Path) -> None:
    """Refuse a file of an unknown format, and a name that the document table cannot hold."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        raise DataError(f"{os.fsencode(file)!r}: this name is not UTF-8; rename it") from None
    format_of(file)


def _check_named_once(files: Sequence[Path]) -> None:
    seen: set[str] = set()
    for file in files:
        place = _place(file)
        if place in seen:
            raise DataError(f"{file}: named twice, so its documents would be read twice")
        seen.add(place)


def _told(passed_over: Counter[str]) -> str:
    counts = ", ".join(f"{n:,} {reason}" for reason, n in sorted(passed_over.items()) if n)
    return f" ({counts})" if counts else ""


def _place(path: Path) -> str:
    """Where a file or folder really is: one name for all links to it. Inode numbers would not do:
    some file systems have none."""
    if path.is_symlink():
        return os.path.realpath(path)
    return os.path.join(_real(str(path.parent)), path.name)


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)
