"""A plan as text: what fits, what it costs, what to look at. For a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import StringIO
from itertools import groupby
from shlex import quote
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_curr.plan.memory import StageMemory
from megatron_curr.plan.phases import MOST_EPOCHS
from megatron_curr.recipe.layout_name import name_of
from megatron_curr.units import format_bytes, format_count, format_duration

if TYPE_CHECKING:
    from megatron_curr.plan.findings import PhasePlan, Plan

_GIB = 2**30
_MOST_STAGES = 16  # shown; of more, the first and the last


def page(plan: Plan, *, width: int) -> str:
    """The whole plan, ``width`` columns wide, without colours."""
    stream = StringIO()
    console = Console(file=stream, width=width, highlight=False)
    print_plan(plan, console)
    return stream.getvalue()


def print_plan(plan: Plan, console: Console) -> None:
    """Onto a console that may know colours."""
    for part in _parts(plan, console.width):
        console.print(part)


def _parts(plan: Plan, width: int) -> Iterator[RenderableType]:
    yield _headline(plan)
    yield from ("", _memory_table(plan))
    yield from ("", _step_lines(plan))
    if plan.messages:
        yield from ("", _message_table(plan))
    yield from ("", _phase_table(plan))
    if plan.epochs:
        yield from ("", _epoch_table(plan))
    yield from ("", _checkpoint_line(plan))
    yield from _notes("warning", "yellow", plan.warnings)
    yield from _notes("note", "cyan", plan.remarks)
    yield from ("", _verdict(plan))
    if plan.alternatives:
        yield _alternatives(plan, width)


def _headline(plan: Plan) -> Text:
    recipe, cluster = plan.recipe, plan.cluster
    preset = f"{recipe.model.preset}, " if recipe.model.preset else ""
    active = ""
    if plan.active_parameters != plan.parameters:
        active = f" ({format_count(plan.active_parameters)} active)"
    layout = name_of(recipe.parallel, cluster.world_size)
    what = f"{preset}{format_count(plan.parameters)} parameters{active}"
    nodes = "1 node" if cluster.num_nodes == 1 else f"{cluster.num_nodes} nodes"
    where = f"{nodes} x {cluster.gpus_per_node} {cluster.gpu.name}"
    return Text.assemble(
        (recipe.name, "bold"),
        f": {what}, {recipe.training.precision}\n",
        f"{where} = {cluster.world_size} ranks: layout {layout}\n",
        f"data {plan.axes.data.size}, micro-batches of "
        f"{recipe.parallel.micro_batch_tokens:,} tokens, recompute {_recompute(plan)}",
    )


def _recompute(plan: Plan) -> str:
    parallel = plan.recipe.parallel
    if parallel.recompute_granularity == "selective":
        return " and ".join(parallel.recompute_modules or ["core_attn"])
    return parallel.recompute_granularity or "nothing"


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )


def _memory_table(plan: Plan) -> Table:
    table = _table("Memory of a rank, GiB")
    table.add_column("stage")
    heads = ("layers", "weights", "grads", "Adam", "activations", "scratch", "buffers", "margin")
    for head in (*heads, "most", "GPU"):
        table.add_column(head, justify="right")
    for label, number in _shown_stages(plan):
        if number is None:
            table.add_row(label)
            continue
        memory, layers = plan.memory[number], len(plan.stages[number].layers)
        table.add_row(label, str(layers), *_gibs(memory), *_most(plan, number))
    return table


def _gibs(memory: StageMemory) -> list[str]:
    parts = (
        memory.parameters,
        memory.gradients,
        memory.optimizer,
        memory.activations,
        memory.workspace,
        memory.buffers,
        memory.margin,
    )
    return [f"{part / _GIB:.2f}" for part in parts]


def _most(plan: Plan, number: int) -> tuple[Text, Text]:
    total = plan.memory[number].total
    share = total / plan.cluster.gpu.memory_bytes
    style = "red" if share > 1 else "yellow" if share > 0.95 else ""
    return Text(f"{total / _GIB:.2f}", style), Text(f"{share:.0%}", style)


def _shown_stages(plan: Plan) -> list[tuple[str, int | None]]:
    """(label, stage) of every row: equal neighbours share one, and of many some are left out."""
    rows: list[tuple[str, int | None]] = []
    numbers = range(len(plan.stages))
    for _, same in groupby(numbers, key=lambda n: (len(plan.stages[n].layers), plan.memory[n])):
        group = list(same)
        label = f"{group[0]}" if len(group) == 1 else f"{group[0]}-{group[-1]}"
        rows.append((label, group[0]))
    if len(rows) > _MOST_STAGES:
        rows = [*rows[: _MOST_STAGES - 4], ("...", None), *rows[-4:]]
    return rows


def _step_lines(plan: Plan) -> Text:
    last = plan.phases[-1]
    step = last.step
    lines = Text()
    lines.append("Step", "bold")
    lines.append(f" (phase {last.steps.name}, {last.num_micro_batches:.4g} micro-batches a rank)\n")
    attention = f"{last.flops_per_token / 1e9:,.4g} GFLOP a token, both passes, attention included"
    lines.append(f"  work      {attention}\n")
    lines.append(f"  model     {format_duration(step.total_s)}")
    parts = {
        "matrices": step.compute_s,
        "messages": step.messages_s,
        "bubble": step.bubble_s,
        "gradients": step.gradients_s,
        "update": step.update_s,
    }
    least_s = step.total_s / 1000  # what is less is not worth a word
    spent = [f"{name} {format_duration(part)}" for name, part in parts.items() if part > least_s]
    lines.append(f" = {' + '.join(spent)}\n")
    how = "stated" if plan.stated_mfu else "expected"
    lines.append(
        f"  {how:9} {plan.mfu:.1%} of peak (MFU) over the run; this step "
        f"{format_duration(last.step_s)}, {format_count(round(last.tokens_per_s))} tokens/s, "
        f"{format_count(round(last.tokens_per_s / plan.cluster.world_size))} a GPU"
    )
    return lines


def _message_table(plan: Plan) -> Table:
    table = _table("Messages of a rank in a step")
    for head in ("axis", "ranks", "what", "over"):
        table.add_column(head, justify="right" if head == "ranks" else "left")
    for head in ("sent", "takes", "hidden"):
        table.add_column(head, justify="right")
    rounds = round(plan.phases[-1].num_micro_batches)
    for message in plan.messages:
        sent = message.step_bytes(rounds)
        table.add_row(
            message.axis.name,
            str(message.axis.size),
            message.what,
            message.axis.link(plan.cluster),
            format_bytes(sent),
            format_duration(message.seconds(plan.cluster, rounds)),
            f"{message.hidden_frac:.0%}" if message.hidden_frac else "no",
        )
    return table


def _phase_table(plan: Plan) -> Table:
    table = _table("Phases")
    table.add_column("phase")
    for head in (
        "tokens",
        "length",
        "batch, tokens",
        "steps",
        "step",
        "bubble",
        "tokens/s",
        "time",
    ):
        table.add_column(head, justify="right")
    for phase in plan.phases:
        table.add_row(*_phase_row(phase))
    if len(plan.phases) > 1:
        tokens = sum(phase.steps.tokens for phase in plan.phases)
        steps = sum(phase.steps.steps for phase in plan.phases)
        whole = ["all", format_count(tokens), "", "", f"{steps:,}", "", ""]
        speed = format_count(round(tokens / (plan.hours * 3600)))
        table.add_row(*whole, speed, format_duration(plan.hours * 3600), style="bold")
    return table


def _phase_row(phase: PhasePlan) -> list[str]:
    steps = phase.steps
    batch = format_count(steps.first_batch_tokens)
    if steps.last_batch_tokens != steps.first_batch_tokens:
        batch += f" to {format_count(steps.last_batch_tokens)}"
    return [
        steps.name,
        format_count(steps.tokens),
        f"{steps.seq_length:,}",
        batch,
        f"{steps.steps:,}",
        format_duration(phase.step_s),
        f"{phase.step.bubble_frac:.1%}",
        format_count(round(phase.tokens_per_s)),
        format_duration(phase.hours * 3600),
    ]


def _epoch_table(plan: Plan) -> Table:
    table = _table("Epochs of each source, by the end of a phase")
    table.add_column("source")
    for phase in plan.phases:
        table.add_column(phase.steps.name, justify="right")
    for source, by_phase in plan.epochs.items():
        cells = [Text(f"{read:.2f}", "yellow" if read > MOST_EPOCHS else "") for read in by_phase]
        table.add_row(source, *cells)
    return table


def _checkpoint_line(plan: Plan) -> Text:
    checkpoints = plan.checkpoints
    return Text.assemble(
        ("Checkpoints", "bold"),
        f" {format_bytes(checkpoints.bytes_each)} each, {checkpoints.num_written:,} written, "
        f"{checkpoints.num_kept:,} kept; at most {checkpoints.most_at_once:,} on disk at a time: "
        f"{format_bytes(checkpoints.most_bytes)}",
    )


def _notes(kind: str, style: str, notes: Sequence[str]) -> Iterator[Text]:
    for note in notes:
        yield Text.assemble((f"{kind}: ", style), note)


def _verdict(plan: Plan) -> Text:
    has = plan.cluster.gpu.memory_bytes
    lines = Text()
    for problem in plan.problems:
        lines.append("DOES NOT FIT: ", "bold red").append(f"{problem}\n")
    if plan.fits:
        lines.append("FITS", "bold green")
        lines.append(
            f": {plan.peak_bytes / _GIB:.1f} of {has / _GIB:.1f} GiB on the fullest rank; "
            f"{format_duration(plan.hours * 3600)} of training, "
            f"{format_count(round(plan.hours * plan.cluster.world_size))} GPU hours"
        )
    if plan.refusal:
        lines.append("\nTRAINING WOULD REFUSE IT: ", "bold red").append(plan.refusal)
    lines.rstrip()
    return lines


def _alternatives(plan: Plan, width: int) -> Table:
    table = _table("Nearest layouts that fit, fastest first")
    table.add_column("step", justify="right")
    table.add_column("GiB", justify="right")
    table.add_column("change")
    for found in plan.alternatives:
        step = format_duration(found.step_s)
        changes = _wrapped([f"--set {quote(change)}" for change in found.arguments], width - 24)
        table.add_row(step, f"{found.peak_bytes / _GIB:.1f}", Text(changes))
    return table


def _wrapped(words: Sequence[str], width: int) -> str:
    """Lines that end between words only."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)
