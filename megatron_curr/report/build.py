"""Assemble the page of a run: headline numbers, figures, tables, recipe."""

from __future__ import annotations

import base64
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from megatron_curr.incarnation.accounts import read_accounts
from megatron_curr.incarnation.record import TIMES
from megatron_curr.report import facts, views
from megatron_curr.report.records import Row, RunRecords, read_run
from megatron_curr.report.values import Floats, compact, exact_count, percent, scientific
from megatron_curr.units import format_count, format_duration

REPORT_NAME = "report.html"
CONTACT_SHEET = "samples/contact_sheet.png"
MOST_TABLE_SOURCES = 12

FIGURES: dict[str, Callable[[views.View], str]] = {
    "mixture": views.mixture,
    "heldout_loss": views.heldout_loss,
    "train_loss": views.train_loss,
    "learning_rate": views.learning_rate,
    "global_batch": views.global_batch,
    "sequence_length": views.sequence_length,
    "throughput": views.throughput,
    "gradient_norm": views.gradient_norm,
    "step_times": views.step_times,
    "step_time_spread": views.step_time_spread,
}


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    note: str


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into the run folder and name it. Raises ``CheckpointError``."""
    page = build_report(run_folder)
    target = run_folder / REPORT_NAME
    beside = target.with_name(f".{REPORT_NAME}.{os.getpid()}")
    beside.write_text(page, encoding="utf-8")
    beside.replace(target)
    return target


def build_report(run_folder: Path) -> str:
    """The page as text. Raises ``CheckpointError`` when the folder holds no run."""
    run = read_run(run_folder)
    view = views.build_view(run)
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        count=format_count, exact=exact_count, percent=percent, rate=scientific, compact=compact
    )
    environment.filters["duration"] = _duration
    template = environment.from_string(_resource("page.html.j2"))
    gap_tokens, gap_source = facts.largest_mixture_gap(run)
    phases = facts.phase_facts(run)
    return template.render(
        run=run,
        view=view,
        figures={name: Markup(draw(view)) for name, draw in FIGURES.items()},
        tiles=_tiles(run),
        status=_status(run),
        setup=_setup(run),
        phases=phases,
        table_sources=_table_sources(run, phases),
        switches=facts.switches(run),
        uncounted=facts.uncounted(run),
        neighbour_steps=facts.NEIGHBOUR_STEPS,
        gap_tokens=round(gap_tokens),
        gap_source=gap_source,
        gap_samples=gap_tokens / max(phase.seq_length for phase in phases),
        accounts=read_accounts(run_folder),
        contact_sheet=_contact_sheet(run_folder),
        time_names=tuple(TIMES),
        recipe_html=_coloured_yaml(run.recipe_text),
        style=Markup(_resource("page.css")),
        script=Markup(_resource("page.js")),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        program_version=_program_version(),
    )


def _contact_sheet(run_folder: Path) -> str | None:
    """What ``sample`` drew last for this run, as a data address; the page stays one file."""
    try:
        content = (run_folder / CONTACT_SHEET).read_bytes()
    except FileNotFoundError:
        return None
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _resource(name: str) -> str:
    return files("megatron_curr.report").joinpath(name).read_text(encoding="utf-8")


def _program_version() -> str:
    try:
        return version("megatron-curr")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source tree"


def _duration(value_s: float) -> str:
    return format_duration(value_s) if math.isfinite(value_s) else "–"


def _tiles(run: RunRecords) -> list[Tile]:
    total = run.schedule.total_tokens
    done = run.consumed_tokens
    rates = run.steps.column("perf/tokens_per_s")
    rates = rates[np.isfinite(rates)]
    spent_s = float(np.nansum(run.steps.column("perf/step_time_s")))
    evaluated_s = float(np.nansum(run.evaluations.column("eval/time_s")))
    saved_s = float(np.nansum(run.checkpoints.column("checkpoint/blocked_s")))
    first, last = _mean_heldout(run)
    num_restarts = len(facts.restarts(run))
    refused = run.steps.column("train/nonfinite_steps")
    num_refused = int(np.nanmax(refused)) if np.isfinite(refused).any() else 0
    return [
        Tile("Tokens", format_count(done), f"{percent(done / total)} of {format_count(total)}"),
        Tile(
            "Held-out loss",
            f"{last:.3f}" if math.isfinite(last) else "–",
            f"{run.loss_unit}, mean of sources; {first:.2f} at first"
            if math.isfinite(first)
            else "not evaluated yet",
        ),
        Tile(
            "Throughput",
            compact(float(np.median(rates))) if len(rates) else "–",
            "tokens per second, median step",
        ),
        Tile(
            "Training time",
            format_duration(spent_s),
            f"+ {format_duration(evaluated_s)} evaluating, {format_duration(saved_s)} saving",
        ),
        Tile(
            "Steps",
            exact_count(len(run.steps)),
            "none refused" if not num_refused else f"{num_refused} refused, not finite",
        ),
        Tile(
            "Restarts",
            str(num_restarts),
            "resumed from a checkpoint" if num_restarts else "in one piece",
        ),
    ]


def _layout(start: Row) -> str:
    """``2 ranks (TP 2)``, ``1 rank``."""
    num_ranks = int(start["run/num_ranks"])
    sizes = [(axis, int(start.get(f"run/{axis}_size") or 1)) for axis in ("dp", "tp", "pp", "cp")]
    axes = " ".join(f"{axis.upper()} {size}" for axis, size in sizes if size > 1)
    return f"{num_ranks} rank{'s' * (num_ranks > 1)}" + (f" ({axes})" if axes else "")


def _mean_heldout(run: RunRecords) -> tuple[float, float]:
    """Mean held-out loss over the sources at the first and at the last evaluation."""
    columns = [run.evaluations.column(f"eval/{s}/{run.loss}") for s in run.sources]
    table = np.array([column for column in columns if np.isfinite(column).any()])
    if not table.size:
        return math.nan, math.nan
    return _mean_of_known(table[:, 0]), _mean_of_known(table[:, -1])


def _mean_of_known(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _status(run: RunRecords) -> str:
    if run.is_finished:
        return "finished"
    return "not finished" if len(run.steps) else "no step yet"


def _setup(run: RunRecords) -> str:
    """One line: model, layout, precision."""
    model = run.recipe.model
    starts = [_layout(row) for row in run.starts.rows] or ["not started"]
    parts = [
        f"{model.num_layers} layers × {model.hidden_size}",
        f"{model.num_attention_heads} heads, {model.num_query_groups} for keys and values",
    ]
    parts.append(", then ".join(dict.fromkeys(starts)))
    parts.append(run.recipe.training.precision)
    parts.append(f"seed {run.recipe.seed}")
    return "  ·  ".join(parts)


def _table_sources(run: RunRecords, phases: tuple[facts.PhaseFacts, ...]) -> list[str]:
    """Sources the tables name: all, or the largest when there are many."""
    planned = {n: sum(phase.planned_source_tokens[n] for phase in phases) for n in run.sources}
    largest = set(sorted(planned, key=lambda name: -planned[name])[:MOST_TABLE_SOURCES])
    return [name for name in run.sources if name in largest]


def _coloured_yaml(text: str) -> Markup:
    """The recipe with its keys and comments marked up."""
    lines = []
    for line in text.splitlines():
        marked = escape(line)
        if line.lstrip().startswith("#"):
            marked = f'<span class="comment">{marked}</span>'
        else:
            marked = re.sub(
                r"^(\s*(?:- )?)([\w./-]+)(:)", r'\1<span class="key">\2</span>\3', marked
            )
        lines.append(marked)
    return Markup("\n".join(lines))
