"""Verbs around runs on a cluster: plan, submit, status, amend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_curr.cli.app import AsJson, Overrides, RecipeFile, RunFolder, app, count

if TYPE_CHECKING:
    from megatron_curr.plan.findings import Plan

GpuMemory = Annotated[
    float | None, typer.Option(min=0.1, help="Memory of a GPU, GiB, instead of the table's.")
]
GpuPeak = Annotated[float | None, typer.Option(min=0.1, help="Its dense bf16 peak, TFLOP/s.")]
NvlinkRate = Annotated[
    float | None, typer.Option(min=0.1, help="One way to GPUs of the same node, GB/s.")
]
NetworkRate = Annotated[
    float | None, typer.Option(min=0.1, help="One way to other nodes, GB/s for each GPU.")
]


@app.command(
    epilog="Example: megatron-curr plan configs/llama3_70b.yaml --nodes 64 --gpus-per-node 8 "
    "--gpu h100-80gb"
)
def plan(
    recipe: RecipeFile,
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of a node, a rank each.")] = 8,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="Such as h100-80gb; another with the numbers below.")
    ] = "h100-80gb",
    gpu_memory_gib: GpuMemory = None,
    peak_tflops: GpuPeak = None,
    nvlink_gb_s: NvlinkRate = None,
    network_gb_s: NetworkRate = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Utilisation to reckon with, instead of our estimate."),
    ] = None,
    local_modules: Annotated[
        bool, typer.Option("--local-modules", help="Plan without Transformer Engine.")
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Say whether a run fits and what it costs; exits with 1 where it does not fit.

    Memory of every pipeline stage, messages, time, epochs, checkpoints; needs neither GPU nor data.
    Where the data is here, all is checked that training would refuse.
    """
    from launch.check import refusal_of
    from megatron_curr.data.survey import survey_data
    from megatron_curr.plan.cluster import Cluster, find_gpu
    from megatron_curr.plan.run_plan import plan_run
    from megatron_curr.recipe.load import load_recipe

    chosen = find_gpu(
        gpu,
        memory_gib=gpu_memory_gib,
        peak_tflops=peak_tflops,
        nvlink_gb_s=nvlink_gb_s,
        network_gb_s=network_gb_s,
    )
    wanted = load_recipe(recipe, overrides or [])
    survey = survey_data(wanted)
    made = plan_run(
        wanted,
        Cluster(num_nodes=nodes, gpus_per_node=gpus_per_node, gpu=chosen),
        vocab_size=survey.vocab_size,
        source_tokens=survey.source_tokens,
        document_tokens=survey.document_tokens,
        remarks=survey.remarks,
        mfu=mfu,
        is_fused=not local_modules,
    )
    made = replace(made, refusal=refusal_of(wanted, nodes * gpus_per_node, survey))
    typer.echo(json.dumps(made.json(), indent=2)) if as_json else _print_plan(made)
    raise typer.Exit(0 if made.fits and not made.refusal else 1)


def _print_plan(made: Plan) -> None:
    from rich.console import Console

    from megatron_curr.plan.page import print_plan

    # A log has no width of its own: rich would cut the columns at 80.
    print_plan(made, Console(highlight=False, width=max(Console().width, 100)))


@app.command(
    epilog="Example: megatron-curr submit configs/demo_text.yaml "
    "--profile configs/clusters/bare.yaml --until-done"
)
def submit(
    recipe: RecipeFile,
    profile: Annotated[Path, typer.Option(help="The cluster's profile, in YAML.")],
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Nodes of the job. Default: the profile's.")
    ] = None,
    chain: Annotated[
        int, typer.Option(min=1, help="Jobs, one after the other, that the run may take.")
    ] = 1,
    until_done: Annotated[
        bool, typer.Option("--until-done", help="As many jobs as it takes; see docs/slurm.md.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script; write and submit nothing.")
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Check a run against the cluster, freeze code and recipe, and submit it to Slurm."""
    from launch.slurm.submit import Wish, submit_run

    wish = Wish(num_nodes=nodes, chain=None if until_done else chain)
    done = submit_run(recipe, profile, overrides or [], wish, dry_run=dry_run)
    if done.unchecked:
        typer.echo(done.unchecked, err=True)
    typer.echo(done.as_json() if as_json else done.as_text())


@app.command(epilog="Example: megatron-curr status runs/demo_text --watch")
def status(
    run: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until it is over.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Say how a run is doing, from Slurm and its folder, also when Slurm no longer knows it."""
    from launch.slurm.status import show_status

    show_status(run, watch=watch, as_json=as_json)


@app.command(
    epilog="Example: megatron-curr amend runs/demo_text more_math.yaml --from 1.2M --dry-run"
)
def amend(
    run: RunFolder,
    recipe: RecipeFile,
    from_token: Annotated[
        int | None,
        typer.Option(
            "--from",
            parser=count,
            metavar="TOKENS",
            help="First token it is valid for. Default: the first that can still be changed.",
        ),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "amended",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print; write nothing.")
    ] = False,
    extend: Annotated[
        bool,
        typer.Option("--extend", help="Where --from lies past the end: begin at the end instead."),
    ] = False,
    as_json: AsJson = False,
    overrides: Overrides = None,
) -> None:
    """Change the future of a running or stopped run to what a recipe says from a token on."""
    from megatron_curr.recipe.load import load_recipe
    from megatron_curr.training.amend import amend_run

    done = amend_run(
        run,
        load_recipe(recipe, overrides or []),
        from_tokens=from_token,
        reason=reason,
        extend=extend,
        write=not dry_run,
    )
    typer.echo(done.as_json() if as_json else done.as_text())


@app.command(epilog="Example: megatron-curr rollback runs/demo_text --to 819200 --dry-run")
def rollback(
    run: RunFolder,
    to: Annotated[
        int,
        typer.Option(parser=count, metavar="TOKENS", help="The token of one of its checkpoints."),
    ],
    reason: Annotated[str, typer.Option(help="Why, for the ledger.")] = "rolled back",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Take a run that is not running back to a checkpoint; what came after is set aside."""
    from megatron_curr.training.rollback import roll_back

    done = roll_back(run, to, reason=reason, write=not dry_run)
    typer.echo(done.as_json() if as_json else done.as_text())
