"""How the rules name a place in the recipe and the values that would work there."""

from __future__ import annotations

from megatron_curr.recipe.yaml_lines import Path


def phase_path(index: int, *rest: str | int) -> Path:
    """The path of a phase, or of something in it."""
    return ("curriculum", "phases", index, *rest)


def either(value: int, unit: int) -> str:
    """The multiples of ``unit`` next to ``value``, nearest first."""
    below = value // unit * unit
    near = sorted({below, below + unit} - {0}, key=lambda multiple: abs(multiple - value))
    return " or ".join(f"{multiple:_}" for multiple in near)


def use(value: int, unit: int) -> str:
    """``such as 2 or 4``."""
    return f"such as {either(value, unit)}"


def divisors_of(number: int) -> list[int]:
    """Every divisor, smallest first."""
    small = [divisor for divisor in range(1, int(number**0.5) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def divisors(number: int) -> str:
    """``1, 2 or 4``."""
    every = [str(divisor) for divisor in divisors_of(number)]
    return every[0] if len(every) == 1 else f"{', '.join(every[:-1])} or {every[-1]}"
