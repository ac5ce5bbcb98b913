"""Counts, bytes and durations as people write them: ``1.5T`` tokens, ``31 GiB``, ``4 h 10 m``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal

SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_COUNT = re.compile(
    r"(?P<number>[+-]?(\d[\d_]*)(\.\d+)?([eE][+-]?\d+)?)\s*(?P<suffix>k|M|B|T|K|m|b|t|)"
)
_LARGEST_EXPONENT = 30  # keeps a mistyped 1e999999 from filling the memory with digits
_COUNTS = "count; write a whole number such as 4096, 1_000, 400k, 2.5M, 100B or 1.5T"
_LENGTHS = "length in tokens; write a whole number such as 4096 or 4k, which is 4,096"
_LENGTH_SUFFIXES = {"": 1, "k": 2**10, "M": 2**20}


def parse_count(value: object) -> int:
    """A count from an int, a whole float, or text such as ``400k`` and ``1.5T`` (powers of 1,000).

    Raises ``ValueError`` that says what is accepted; a fraction of one is an error, never rounded.
    """
    return _parse(value, SUFFIXES, _COUNTS)


def parse_length(value: object) -> int:
    """A sequence length: as a count, but ``4k`` is 4,096, ``128k`` 131,072 and ``1M`` 1,048,576.

    So models are named, and such lengths divide each other. Raises ``ValueError``.
    """
    return _parse(value, _LENGTH_SUFFIXES, _LENGTHS)


def _parse(value: object, suffixes: Mapping[str, int], accepted: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a {accepted}")
    if isinstance(value, int):
        return value
    match = _COUNT.fullmatch(str(value).strip())
    suffix = match["suffix"] if match else ""
    suffix = "k" if suffix in ("k", "K") else suffix.upper()
    if match is None or suffix not in suffixes:
        raise ValueError(f"{value!r} is not a {accepted}")
    number = Decimal(match["number"].replace("_", ""))
    if number.adjusted() > _LARGEST_EXPONENT:
        raise ValueError(f"{value!r} is too large for a {accepted}")
    scaled = number * suffixes[suffix]
    if scaled != scaled.to_integral_value():
        raise ValueError(f"{value!r} is not a whole {accepted}")
    return int(scaled)


def format_count(count: int, *, exact: bool = False) -> str:
    """``1.23M`` for people; with ``exact`` every digit, so that ``parse_count`` gives it back."""
    for suffix, scale in reversed(SUFFIXES.items()):
        if abs(count) < scale and scale > 1:
            continue
        if exact:
            return f"{_plain(Decimal(count) / scale)}{suffix}"
        rounded = _rounded(count / scale)
        if rounded == "1000" and suffix in "kMB":  # 999,999 is 1M and not 1000k
            return format_count(round(count / scale) * scale)
        return f"{rounded}{suffix}"
    raise AssertionError("the last suffix stands for one")


def format_bytes(size_bytes: float) -> str:
    """``31 GiB``, ``1.5 KiB``, ``12 B``: powers of 1,024, three digits."""
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            return f"{_rounded(size)} {unit}"
        size /= 1024
    raise AssertionError("the last unit takes every size")


def format_duration(duration_s: float) -> str:
    """``250 ms``, ``3.2 s``, ``2 m 5 s``, ``4 h 10 m``, ``3 d 2 h``: the two largest units."""
    if duration_s < 0:
        return f"-{format_duration(-duration_s)}"
    if duration_s < 0.9995:
        return f"{_rounded(duration_s * 1000)} ms"
    if duration_s < 59.95:
        return f"{_rounded(duration_s)} s"
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (seconds, "s")]
    while parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in parts[:2] if value)


def _rounded(number: float) -> str:
    """Three significant digits, no exponent, no trailing zeros."""
    return _plain(Decimal(f"{number:.3g}"))


def _plain(number: Decimal) -> str:
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
