"""Numbers for people: tick positions, short forms, thinning and smoothing of curves."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def significant(value: float, digits: int) -> float:
    """``value`` to so many significant digits."""
    return float(f"{value:.{digits}g}")


def compact(value: float) -> str:
    """``0``, ``0.25``, ``12``, ``1.5k``, ``3M``: at most three digits and a suffix."""
    magnitude = abs(value)
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if magnitude >= scale * 0.9995:
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.3g}"


def exact_count(count: float) -> str:
    """``1,234,567``."""
    return f"{round(count):,}"


def percent(share: float) -> str:
    """``0.25`` as ``25%``."""
    return f"{share * 100:.3g}%"


def scientific(value: float) -> str:
    """``3e-4`` as ``3e-4``: no padding in the exponent; plain where that is shorter."""
    if value == 0 or 0.01 <= abs(value) < 1000:
        return f"{value:.3g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    return f"{mantissa}e{int(exponent)}"


def nice_ticks(low: float, high: float, count: int, *, is_log: bool = False) -> tuple[float, ...]:
    """Round values inside [low, high], about ``count`` of them."""
    if not high > low:
        return (low,)
    if is_log:
        return _log_ticks(low, high, count)
    rough = (high - low) / max(count, 1)
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(scale * unit for unit in (1, 2, 2.5, 5, 10) if scale * unit >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(significant(index * step, 12) for index in range(first, last + 1))


def _log_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for units in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [unit * 10.0**decade for decade in decades for unit in units]
        inside = tuple(tick for tick in ticks if low * 0.999 <= tick <= high * 1.001)
        if len(inside) <= count + 2:
            return inside
    return inside


def padded_range(values: Sequence[Floats], *, floor: float | None = None) -> tuple[float, float]:
    """A range that holds every finite value with a little air; ``floor`` fixes its lower end."""
    finite = [column[np.isfinite(column)] for column in values]
    joined = np.concatenate(finite) if finite else np.zeros(0)
    if not len(joined):
        return (floor or 0.0, (floor or 0.0) + 1.0)
    low, high = float(joined.min()), float(joined.max())
    air = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (low - air if floor is None else floor, high + air)


def smoothed(x: Floats, y: Floats, width: float) -> Floats:
    """Mean of ``y`` over a window of ``width`` in x centred on each point; NaN is left out."""
    seen = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(seen, y, 0.0))])
    count = np.concatenate([[0], np.cumsum(seen)])
    first = np.searchsorted(x, x - width / 2, side="left")
    last = np.searchsorted(x, x + width / 2, side="right")
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (total[last] - total[first]) / (count[last] - count[first])
    return np.where(seen, mean, np.nan)


def thinned(x: Floats, y: Floats, most: int) -> tuple[Floats, Floats]:
    """At most about ``most`` points that keep every bucket's least and greatest value."""
    if len(x) <= most:
        return x, y
    kept: list[int] = [0]
    for bucket in np.array_split(np.arange(len(x)), max(most // 2, 1)):
        seen = bucket[np.isfinite(y[bucket])]
        if len(seen):
            pair = {int(seen[np.argmin(y[seen])]), int(seen[np.argmax(y[seen])])}
            kept.extend(sorted(pair))
    kept.append(len(x) - 1)
    index = np.unique(np.array(kept))
    return x[index], y[index]
