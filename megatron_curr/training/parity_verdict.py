"""What a comparison of two layouts says: in numbers, in one sentence, in a table. No torch here."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

FIRST_WEIGHTS = "first weights"
GRADIENTS = "gradients"
WEIGHTS = "weights"
LOSS = "loss"
GRAD_NORM = "gradient norm"
REPLICAS = "replicas"
QUANTITIES = (FIRST_WEIGHTS, LOSS, GRAD_NORM, GRADIENTS, WEIGHTS)  # columns of the table


@dataclass(frozen=True)
class Difference:
    """By how much one quantity of a layout is off; ``parameter`` None for a loss or a norm.

    ``relative`` is infinite where the shape is another, or the parameter is on one side only.
    """

    quantity: str
    parameter: str | None
    relative: float

    def __str__(self) -> str:
        if self.quantity == REPLICAS:
            return f"ranks hold different copies of {self.parameter}"
        if self.parameter is None:
            return f"{self.quantity} by {self.relative:.1e}"
        if math.isinf(self.relative):
            return f"{self.quantity} of {self.parameter}: missing, or of another shape"
        return f"{self.quantity} of {self.parameter} by {self.relative:.1e}"


@dataclass(frozen=True)
class Verdict:
    """How a layout compares with the reference."""

    layout: str
    num_ranks: int
    largest: dict[str, Difference]  # by quantity
    differing: tuple[Difference, ...]  # above the tolerance; parameters first, in model order

    @property
    def agrees(self) -> bool:
        """Whether nothing differs by more than the tolerance, and no replica by a bit."""
        return not self.differing

    def of(self, quantity: str) -> list[Difference]:
        """What differs in one quantity, in model order."""
        return [difference for difference in self.differing if difference.quantity == quantity]

    @property
    def in_short(self) -> str:
        """``equal``, or what differs."""
        return "equal" if self.agrees else self.sentence()

    def sentence(self) -> str:
        """What differs first, and how much else does; only where something does."""
        first, rest = self.differing[0], {}
        for difference in self.differing[1:]:
            rest[difference.quantity] = rest.get(difference.quantity, 0) + 1
        others = [
            str(self.largest[quantity])
            if quantity in (LOSS, GRAD_NORM)
            else f"{quantity} of {count} more"
            for quantity, count in rest.items()
        ]
        return f"{self.layout} differs: {first}" + (f"; also {', '.join(others)}" if others else "")

    def to_json(self) -> str:
        """As one JSON object; an infinite difference becomes null."""
        return json.dumps(_finite(asdict(self)))

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """Inverse of ``to_json``."""
        values = json.loads(text)
        return cls(
            layout=values["layout"],
            num_ranks=values["num_ranks"],
            largest={name: _difference(value) for name, value in values["largest"].items()},
            differing=tuple(map(_difference, values["differing"])),
        )


def print_table(verdicts: Sequence[Verdict], *, title: str, console: Console) -> None:
    """Layouts by largest relative differences."""
    table = Table(title=title, title_justify="left")
    table.add_column("layout", no_wrap=True, min_width=max(len(v.layout) for v in verdicts))
    table.add_column("ranks", justify="right")
    for quantity in (*QUANTITIES, REPLICAS, ""):
        table.add_column(quantity, justify="right")
    for verdict in verdicts:
        unequal = len(verdict.of(REPLICAS))
        agrees = (
            Text("equal", style="green") if verdict.agrees else Text("differs", style="bold red")
        )
        table.add_row(
            verdict.layout,
            str(verdict.num_ranks),
            *(_cell(verdict, quantity) for quantity in QUANTITIES),
            Text(f"{unequal} differ", style="red") if unequal else "bit-equal",
            agrees,
        )
    console.print(table)


def _cell(verdict: Verdict, quantity: str) -> Text:
    relative = verdict.largest[quantity].relative
    text = "0" if relative == 0 else f"{relative:.1e}"
    return Text(text, style="red" if verdict.of(quantity) else "")


def _difference(values: dict[str, Any]) -> Difference:
    relative = math.inf if values["relative"] is None else values["relative"]
    return Difference(values["quantity"], values["parameter"], relative)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
