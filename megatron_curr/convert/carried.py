"""Which files of a model folder go along with its weights as they are: tokenizer, licence, card.

A tokenizer comes in many files: Mistral's tekken.json, Kimi's tiktoken.model with Python code that
reads it, Qwen's qwen.tiktoken. What is neither of these, nor weights, is named and not lost.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

TOKENIZER_FILES = (
    *("tokenizer*", "tokenization_*.py", "*.tiktoken", "tiktoken*", "tekken*.json", "*.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.*", "vocab-*", "merges.*", "*.model"),
    *("*.spm", "*.bpe", "chat_template*", "additional_chat_templates", "encoding_*.py"),
)
LICENCE_FILES = (
    *("licen[cs]e*", "*_licen[cs]e*", "*-licen[cs]e*", "notice*", "copying*", "*use*policy*"),
)
CARD_FILES = ("readme*", "generation_config.json")
# Read as weights or as the config, or written anew.
_CONVERTED = (
    *("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth"),
    *("*.gguf", "*.onnx", "*.h5", "*.msgpack", "*.npz", "*.ckpt", "*.distcp", "config.json"),
)
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import\b", re.MULTILINE)


def carry_files(folder: Path, target: Path, *, besides: Iterable[str] = ()) -> tuple[str, ...]:
    """Copy what belongs to a tokenizer, a licence or a card; the names of what is left behind.

    Names in ``besides`` are neither copied nor named. Weights and hidden files are not named.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    wanted = {
        name for name in names if is_of(name, (*TOKENIZER_FILES, *LICENCE_FILES, *CARD_FILES))
    }
    wanted |= _imported(folder, wanted)
    left = []
    for name in names:
        if name in besides:
            continue
        if name in wanted:
            copy(folder / name, target / name)
        elif not is_of(name, _CONVERTED):
            left.append(name + ("/" if (folder / name).is_dir() else ""))
    return tuple(left)


def left_behind(folder: Path, names: Iterable[str]) -> tuple[str, ...]:
    """The line that names them; none where nothing was."""
    told = ", ".join(names)
    return (f"left behind in {folder}: {told}",) if told else ()


def is_of(name: str, patterns: Iterable[str]) -> bool:
    """Whether a file name fits one of the patterns, in any case of its letters."""
    return any(fnmatch(name.lower(), pattern) for pattern in patterns)


def copy(path: Path, target: Path) -> None:
    """A file, or a folder with all that is in it; what a link points to, not the link."""
    if path.is_dir():
        shutil.copytree(path, target, dirs_exist_ok=True)
    elif path.is_file():
        shutil.copyfile(path, target)


def _imported(folder: Path, names: Iterable[str]) -> set[str]:
    """Python files beside the tokenizer's that its own need."""
    found: set[str] = set()
    waiting = [name for name in names if name.endswith(".py")]
    while waiting:
        text = (folder / waiting.pop()).read_text(encoding="utf-8", errors="replace")
        needed = {f"{module}.py" for module in _RELATIVE_IMPORT.findall(text)}
        new = {name for name in needed - found if (folder / name).is_file()}
        found |= new
        waiting += new
    return found
