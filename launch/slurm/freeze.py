"""The code of a submission, frozen: what waits in the queue is not changed by further work.

The package goes into the run folder as it is on disk, once for each state of it. Where it comes
from a git checkout, the revision and the difference to it are noted as well.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import data_tools
import launch
import megatron_curr

_PACKAGES = {"megatron_curr": megatron_curr, "launch": launch, "data_tools": data_tools}
_SUFFIXES = {".py", ".yaml", ".j2", ".css", ".js", ".sbatch"}


@dataclass(frozen=True)
class Frozen:
    """Where the copy is and what it is a copy of. Without git ``revision`` is None."""

    folder: Path
    revision: str | None
    difference: str  # as git prints it; empty when nothing differs


def freeze_code(run_folder: Path) -> Frozen:
    """Copy the package under the run folder, unless this very state of it is there already."""
    files = {
        Path(name) / path.relative_to(source): path
        for name, source in _sources().items()
        for path in sorted(source.rglob("*"))
        if path.suffix in _SUFFIXES and "__pycache__" not in path.parts
    }
    digest = hashlib.sha256()
    for name, path in files.items():
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    target = run_folder / "slurm" / "code" / digest.hexdigest()[:16]
    if not target.is_dir():
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        for name, path in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
        partial.rename(target)
    return Frozen(target, *_git_state())


def _sources() -> dict[str, Path]:
    return {name: Path(str(package.__file__)).parent for name, package in _PACKAGES.items()}


def _git_state() -> tuple[str | None, str]:
    """The checked out revision, and how tracked and new files of the packages differ from it."""
    root = _sources()["launch"].parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None, ""
    revision = _git(root, "rev-parse", "HEAD").strip()
    difference = _git(root, "diff", "--binary", "HEAD")
    new = _git(root, "ls-files", "--others", "--exclude-standard", "--", *_PACKAGES).split()
    for name in new:  # exit code 1 says that files differ
        difference += _git(root, "diff", "--binary", "--no-index", "--", os.devnull, name)
    return revision or None, difference


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout
