"""The model card: what the run says about the model, as a Hugging Face README.md and plots."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from megatron_curr.convert.source import RunSource
from megatron_curr.convert.tokenizer import Published
from megatron_curr.curriculum.differences import schedule_differences
from megatron_curr.curriculum.ledger import ledger_schedule, read_ledger
from megatron_curr.report.records import RunRecords, read_run
from megatron_curr.report.views import build_view, heldout_loss, mixture, train_loss
from megatron_curr.units import format_count


@dataclass(frozen=True)
class SourceLine:
    """What one source gave, and the loss on its held-out text, nats per token."""

    name: str
    consumed_tokens: int
    share: float
    epochs: float
    loss: float


def write_card(
    source: RunSource,
    folder: Path,
    *,
    architecture: str,
    num_parameters: int,
    tokenizer: Published,
    made_by: str | None = None,
) -> None:
    """Write ``README.md`` from the run's recipe, state and metrics up to the checkpoint.

    Its plots, under ``plots/``, are those of the run's page, each a file of its own.
    """
    run = read_run(source.folder)
    consumed_tokens = source.state.consumed_tokens
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["count"] = format_count
    template = environment.from_string(
        files("megatron_curr.convert").joinpath("card.md.j2").read_text(encoding="utf-8")
    )
    text = template.render(
        name=source.recipe.name,
        recipe=source.recipe,
        recipe_text=run.recipe_text,
        architecture=architecture,
        made_by=made_by,
        tokenizer=tokenizer,
        num_parameters=num_parameters,
        state=source.state,
        consumed_tokens=consumed_tokens,
        total_tokens=run.schedule.total_tokens,
        phases=_phase_lines(run, consumed_tokens),
        amendments=_amendments(source, consumed_tokens),
        sources=_source_lines(source, run),
        plots=_write_plots(run, folder),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def tell_history(card: Path, history: str) -> None:
    """Say, above what a published card tells, what the weights became since; without one, alone."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n.*?\n---\n", text, re.DOTALL)
    start = head.end() if head else 0
    told = f"\n> The weights are {history}, made by megatron_curr."
    told += " What follows tells the first of them.\n" if text[start:].strip() else "\n"
    card.write_text(text[:start] + told + text[start:], encoding="utf-8")


def _write_plots(run: RunRecords, folder: Path) -> dict[str, str]:
    """Name of every plot that has something to show, by its title."""
    view = build_view(run)
    drawn = {"mixture": ("Share of every source", mixture)}
    if run.steps.rows:
        drawn["train_loss"] = ("Training loss", train_loss)
    if run.evaluations.rows:
        drawn["heldout_loss"] = ("Held-out loss", heldout_loss)
    style = files("megatron_curr.report").joinpath("page.css").read_text(encoding="utf-8")
    (folder / "plots").mkdir(exist_ok=True)
    for name, (_, draw) in drawn.items():
        figure = draw(view).split("</svg>")[0] + "</svg>"  # without what a pointer reads
        figure = figure.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
        figure = figure.replace(">", f"><style>{style}</style>", 1)
        (folder / "plots" / f"{name}.svg").write_text(figure, encoding="utf-8")
    return {title: f"plots/{name}.svg" for name, (title, _) in drawn.items()}


def _phase_lines(run: RunRecords, consumed_tokens: int) -> list[dict[str, object]]:
    lines: list[dict[str, object]] = []
    for phase in run.phases:
        if phase.start_tokens >= consumed_tokens:
            break
        first, last = run.plan_at(phase.start_tokens), run.plan_at(phase.end_tokens - 1)
        lines.append(
            {
                "name": phase.name,
                "tokens": min(phase.end_tokens, consumed_tokens) - phase.start_tokens,
                "seq_length": first.seq_length,
                "batch": _span(f"{first.step_tokens:,}", f"{last.step_tokens:,}"),
                "rate": _span(f"{first.learning_rate:.3g}", f"{last.learning_rate:.3g}"),
                "mixture": _span(
                    _mixture(run, phase.start_tokens), _mixture(run, phase.end_tokens - 1)
                ),
            }
        )
    return lines


def _amendments(source: RunSource, consumed_tokens: int) -> list[dict[str, object]]:
    """What was changed of the plan while the run went on, up to the checkpoint."""
    path = source.folder / "ledger.jsonl"
    ledger = read_ledger(path) if path.is_file() else ()
    lines: list[dict[str, object]] = []
    for number, entry in enumerate(ledger):
        start = entry.edition.from_tokens
        if number == 0 or start >= consumed_tokens:
            continue
        old, new = (ledger_schedule(ledger[:end]) for end in (number, number + 1))
        changes = [str(change) for change in schedule_differences(old, new, from_tokens=start)]
        lines.append({"from_tokens": start, "reason": entry.reason, "changes": changes})
    return lines


def _span(first: str, last: str) -> str:
    return first if first == last else f"{first} → {last}"


def _mixture(run: RunRecords, tokens: int) -> str:
    weights = run.schedule.weights_at(tokens)
    shown = sorted(weights.items(), key=lambda item: -item[1])[:8]
    return ", ".join(f"{name} {weight:.1%}" for name, weight in shown if weight >= 0.0005)


def _source_lines(source: RunSource, run: RunRecords) -> list[SourceLine]:
    known = [
        row
        for row in run.evaluations.rows
        if row["consumed_tokens"] <= source.state.consumed_tokens
    ]
    total = max(sum(state.consumed_tokens for state in source.state.sources.values()), 1)
    lines = []
    for name in source.recipe.data.sources:
        state = source.state.sources.get(name)
        loss = known[-1].get(f"eval/{name}/loss_nats_per_token") if known else None
        lines.append(
            SourceLine(
                name=name,
                consumed_tokens=state.consumed_tokens if state else 0,
                share=(state.consumed_tokens if state else 0) / total,
                epochs=state.epochs if state else 0.0,
                loss=math.nan if loss is None else float(loss),
            )
        )
    return lines
