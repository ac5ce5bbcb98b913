"""``.tiktoken`` rank files, and what OpenAI publishes apart from its own."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from megatron_curr.data.special_tokens import USUAL_EOD
from megatron_curr.data.tokenizer_base import Tokenizer
from megatron_curr.errors import DataError

_LETTER = r"\p{Lm}\p{Lo}\p{M}"
# Split patterns and special tokens that OpenAI publishes with its rank files; source:
# tiktoken_ext/openai_public.py of tiktoken 0.14.
OPENAI_ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "r50k_base": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
        {"<|endoftext|>": 50256},
    ),
    "cl100k_base": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
    "o200k_base": (
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER}]*[\p{{Ll}}{_LETTER}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTER}]+[\p{{Ll}}{_LETTER}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        {"<|endoftext|>": 199999, "<|endofprompt|>": 200018},
    ),
}


class TiktokenTokenizer(Tokenizer):
    """A ``.tiktoken`` rank file. It holds neither the split pattern nor the special tokens: both
    are known for OpenAI's encodings, by file name, or stand in a ``.json`` of that name beside it:
    ``{"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}}``, with ``"bos_token"`` where
    documents may begin with one."""

    library = "tiktoken"

    def __init__(self, path: Path) -> None:
        import tiktoken

        self.pattern, special_tokens, bos_token = _tiktoken_facts(path)
        try:
            ranks = {
                base64.b64decode(token): int(rank)
                for token, rank in map(bytes.split, path.read_bytes().splitlines())
            }
            self._encoding = tiktoken.Encoding(
                path.stem,
                pat_str=self.pattern,
                mergeable_ranks=ranks,
                special_tokens=special_tokens,
            )
        except (ValueError, OSError) as error:
            raise DataError(f"{path}: is not a .tiktoken rank file ({error})") from error
        eod_id = next((special_tokens[end] for end in USUAL_EOD if end in special_tokens), None)
        if eod_id is None:
            raise DataError(
                f"{path}: no end token (looked for {', '.join(USUAL_EOD)}); name it among the "
                f"special_tokens of {path.with_suffix('.json')}"
            )
        super().__init__(
            path,
            vocab_size=self._encoding.max_token_value + 1,
            eod_id=eod_id,
            special_tokens=special_tokens,
        )
        self.bos_id = special_tokens.get(bos_token)

    @property
    def bos_named_in(self) -> str:
        return f"bos_token in {self.path.with_suffix('.json')}"

    def encode_batch(
        self, texts: Sequence[str], *, num_threads: int = 1, allow_special: bool = False
    ) -> list[list[int]]:
        if allow_special:
            return self._encoding.encode_batch(
                list(texts), num_threads=num_threads, allowed_special="all"
            )
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self.special_tokens.values())
        return self._encoding.decode([int(token) for token in ids if int(token) not in special])


def _tiktoken_facts(path: Path) -> tuple[str, dict[str, int], str]:
    """Split pattern, special tokens and BOS of a rank file. Raises ``DataError`` where unknown."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        try:
            return *OPENAI_ENCODINGS[path.stem], ""
        except KeyError:
            known = ", ".join(OPENAI_ENCODINGS)
            raise DataError(
                f"{path}: a rank file has no split pattern, and {path.stem!r} is none of {known}; "
                f'write {{"pattern": ..., "special_tokens": {{...}}}} to {beside}'
            ) from None
    try:
        facts = json.loads(beside.read_bytes())
        special_tokens = {
            str(token): int(place) for token, place in facts["special_tokens"].items()
        }
        return str(facts["pattern"]), special_tokens, str(facts.get("bos_token", ""))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'{beside}: needs "pattern" and "special_tokens" of the rank file ({error!r})'
        ) from error
