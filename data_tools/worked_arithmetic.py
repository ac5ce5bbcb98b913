"""Synthetic text: worked arithmetic in words and digits, from a seed.

Nobody wrote these documents. They exist so that the demo has a source whose skill, carrying a digit
or naming a number, appears in no other source: its held-out loss falls only once it is trained on.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

_ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
    *("eighteen", "nineteen"),
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((10**9, "billion"), (10**6, "million"), (10**3, "thousand"), (100, "hundred"))
_NAMES = (
    *("Ada", "Ben", "Chen", "Dina", "Emil", "Fatma", "Goro", "Hana", "Iris", "Jonas", "Kofi"),
    *("Lena", "Mira", "Noor", "Omar", "Petra"),
)
_THINGS = (
    *("apples", "books", "coins", "stamps", "marbles", "seeds", "bricks", "tickets", "shells"),
    *("pencils", "cards", "lamps"),
)


def number_in_words(number: int) -> str:
    """``1204`` as "one thousand two hundred and four"; for 0 to just below a trillion."""
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    for scale, name in _SCALES:
        if number >= scale:
            count, rest = divmod(number, scale)
            head = f"{number_in_words(count)} {name}"
            if not rest:
                return head
            return (
                f"{head} and {number_in_words(rest)}"
                if rest < 100
                else f"{head} {number_in_words(rest)}"
            )
    raise AssertionError(number)


def worked_arithmetic(seed: int, num_documents: int) -> Iterator[str]:
    """Documents of two to six worked problems; the same seed gives the same text."""
    draw = random.Random(seed)
    for _ in range(num_documents):
        problems = [draw.choice(_PROBLEMS)(draw) for _ in range(draw.randint(2, 6))]
        yield "\n\n".join(problems) + "\n"


def _operand(draw: random.Random, max_digits: int = 5) -> int:
    return draw.randrange(2, 10 ** draw.randint(1, max_digits))


def _addition(draw: random.Random) -> str:
    left, right = _operand(draw), _operand(draw)
    lines = [f"Add {left} and {right}."]
    carry, place = 0, 1
    while place <= max(left, right):
        one, other = left // place % 10, right // place % 10
        total = one + other + carry
        carried = f" plus {carry} carried" if carry else ""
        carry = total // 10
        lines.append(
            f"The {_place(place)}: {one} plus {other}{carried} is {total}, "
            f"write {total % 10}" + (f" and carry {carry}." if carry else ".")
        )
        place *= 10
    if carry:
        lines.append(f"Write the last carry {carry}.")
    lines.append(f"{left} + {right} = {left + right}")
    lines.append(f"In words: {number_in_words(left + right)}.")
    return "\n".join(lines)


def _place(place: int) -> str:
    names = {1: "ones", 10: "tens", 100: "hundreds", 1000: "thousands", 10_000: "ten thousands"}
    return names.get(place, f"{place}s")


def _subtraction(draw: random.Random) -> str:
    small, large = sorted((_operand(draw), _operand(draw)))
    difference = large - small
    return (
        f"What is {large} minus {small}?\n"
        f"{number_in_words(large).capitalize()} minus {number_in_words(small)} is "
        f"{number_in_words(difference)}.\n"
        f"{large} - {small} = {difference}, because {small} + {difference} = {large}."
    )


def _multiplication(draw: random.Random) -> str:
    left, right = _operand(draw, 4), _operand(draw, 3)
    lines = [f"Multiply {left} by {right}."]
    partials = []
    for power, digit in enumerate(reversed(str(right))):
        if digit != "0":
            factor = int(digit) * 10**power
            partials.append(left * factor)
            lines.append(f"{left} x {factor} = {left * factor}")
    if len(partials) > 1:
        lines.append(" + ".join(map(str, partials)) + f" = {sum(partials)}")
    lines.append(f"So {left} x {right} = {left * right}.")
    return "\n".join(lines)


def _division(draw: random.Random) -> str:
    divisor = draw.randrange(2, 100)
    dividend = _operand(draw)
    quotient, rest = divmod(dividend, divisor)
    ending = f"with {rest} left over" if rest else "with nothing left over"
    return (
        f"Divide {dividend} by {divisor}.\n"
        f"{divisor} x {quotient} = {divisor * quotient} "
        f"and {dividend} - {divisor * quotient} = {rest}.\n"
        f"{dividend} / {divisor} = {quotient} {ending}."
    )


def _story(draw: random.Random) -> str:
    first, second = draw.sample(_NAMES, 2)
    thing = draw.choice(_THINGS)
    boxes, each, given = draw.randrange(2, 30), draw.randrange(3, 60), draw.randrange(1, 6)
    total = boxes * each
    return (
        f"{first} has {number_in_words(boxes)} boxes with {each} {thing} in each, and gives "
        f"{given} {thing} to {second}. How many {thing} does {first} keep?\n"
        f"In all there are {boxes} x {each} = {total} {thing}. "
        f"After giving {given} away, {total} - {given} = {total - given} are kept.\n"
        f"Answer: {total - given} ({number_in_words(total - given)})."
    )


def _sequence(draw: random.Random) -> str:
    start, step = _operand(draw, 3), draw.randrange(2, 25)
    terms = [start + step * number for number in range(6)]
    return (
        f"Continue the sequence {', '.join(map(str, terms[:4]))}.\n"
        f"Each term is {step} more than the one before: {terms[3]} + {step} = {terms[4]}, "
        f"{terms[4]} + {step} = {terms[5]}."
    )


def _comparison(draw: random.Random) -> str:
    left, right = _operand(draw), _operand(draw)
    relation = "less than" if left < right else "greater than" if left > right else "equal to"
    sign = "<" if left < right else ">" if left > right else "="
    return (
        f"Compare {number_in_words(left)} with {number_in_words(right)}.\n"
        f"{left} is {relation} {right}: {left} {sign} {right}."
    )


_PROBLEMS: tuple[Callable[[random.Random], str], ...] = (
    _addition,
    _addition,
    _subtraction,
    _multiplication,
    _multiplication,
    _division,
    _story,
    _sequence,
    _comparison,
)
