"""A cluster profile: everything about a site that a recipe should not know, in YAML.

Typed, frozen and refused with file and line like a recipe; ``docs/clusters.md`` says how to write
one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from megatron_curr.errors import RecipeError
from megatron_curr.incarnation.surroundings import is_of_a_launcher
from megatron_curr.recipe.load import load_section
from megatron_curr.recipe.problems import Problem, refusal
from megatron_curr.recipe.section import NAME_PATTERN, Section
from megatron_curr.recipe.yaml_lines import Path as KeyPath

_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<h>\d+):(?P<m>[0-5]?\d)(?::(?P<s>[0-5]?\d))?")
_ONE_LINE = r"^[^\n\r]*$"


def parse_time_limit(value: object) -> int:
    """Seconds from ``D-HH:MM:SS``, ``HH:MM:SS`` or ``HH:MM``, in quotes; ``ValueError`` else."""
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f'{value!r} is no time limit; write "HH:MM:SS" or "D-HH:MM", in quotes')
    days, hours, minutes, seconds = (int(match[part] or 0) for part in "dhms")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def format_time_limit(limit_s: int) -> str:
    """``D-HH:MM:SS`` as sbatch reads it; Slurm rounds up to minutes."""
    minutes, seconds = divmod(limit_s, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}-{hours:02d}:{minutes:02d}:{seconds:02d}"


TimeLimit = Annotated[
    int, BeforeValidator(parse_time_limit), Field(gt=0), WithJsonSchema({"type": "string"})
]
OneLine = Annotated[str, Field(pattern=_ONE_LINE, min_length=1)]


def absolute_on_a_node(value: str) -> str:
    """A path that is absolute, or becomes so by a variable of the node; ``ValueError`` else."""
    if not value.startswith(("/", "$")):
        raise ValueError(
            f"{value!r} is no absolute path; begin it with / or with a variable that every node "
            "sets, such as $TMPDIR"
        )
    return value.rstrip("/")


def without_ranks(environment: dict[str, str]) -> dict[str, str]:
    """Variables that no launcher sets for its ranks; ``ValueError`` else."""
    if strange := [name for name in environment if is_of_a_launcher(name)]:
        raise ValueError(
            f"{', '.join(strange)}: set for every rank by what launches it; take that out"
        )
    return environment


def without_export(options: list[str]) -> list[str]:
    """Options for sbatch that name no variables: ``submit`` decides what a job is given."""
    for option in options:
        match = re.match(r"--export[ =](.*)", option)
        if match and match[1].strip().upper() not in ("ALL", "NONE", "NIL"):
            raise ValueError(
                f"{option!r} names variables; list them in inherit, and values in environment"
            )
    return options


class Container(Section):
    """In what the ranks run. The run folder is mounted without being asked for."""

    engine: Literal["pyxis", "apptainer"]
    image: OneLine = Field(description="A squashfs or sif file, or a registry's name for one")
    mounts: list[OneLine] = Field([], description="HOST:CONTAINER[:ro]; data, tokenizer, home")


class Chain(Section):
    """How a run goes on past the end of a job."""

    by: Literal["singleton", "requeue"] = "singleton"
    max_fruitless: int = Field(3, gt=0, description="Starts in a row without a new checkpoint")
    restarts_per_job: int = Field(
        2, ge=0, description="Starts in the same allocation after the first, where ranks died"
    )
    exclude_hours: float = Field(24, ge=0, description="How long a node that failed is left out")


class Profile(Section):
    """One partition of one cluster, as this project uses it."""

    name: str = Field(pattern=NAME_PATTERN)
    partition: OneLine = Field(description="A partition of the cluster; sinfo lists them")
    account: OneLine | None = None
    qos: OneLine | None = None
    nodes: int = Field(gt=0, description="Nodes of a job where --nodes does not say")
    ranks_per_node: int = Field(gt=0, description="One for each GPU")
    gpus: Literal["gpus-per-node", "gres", "none"] = Field(
        "gpus-per-node", description="How the site wants GPUs asked for"
    )
    gpu: OneLine | None = Field(None, description="What the plan counts with, such as h100-80gb")
    cpus_per_rank: int | None = Field(None, gt=0)
    exclusive: bool = True
    time_limit: TimeLimit = Field(description='"HH:MM:SS" of one job; a chain goes on after it')
    signal_before_end_s: int = Field(
        300, gt=0, description="Ranks are asked to save and end this long before the time limit"
    )
    signal_slack_s: int = Field(60, ge=0, description="How much earlier Slurm may ask them")
    options: Annotated[list[OneLine], AfterValidator(without_export)] = Field(
        [], description="Further lines for sbatch: --reservation=x"
    )
    launcher: Literal["srun", "torchrun"] = Field(
        "srun", description="One task a rank, or one torchrun a node"
    )
    rank_order: Literal["topology", "slurm"] = Field(
        "topology", description="Neighbours in rank order share a switch, or as Slurm numbers them"
    )
    spares: int = Field(0, ge=0, description="Nodes held idle, to take the place of lost ones")
    chain: Chain = Chain()
    container: Container | None = None
    setup: list[OneLine] = Field([], description="Shell lines before the start: module load x")
    python: OneLine = Field("python3", description="Of the ranks, after setup, in the container")
    host_python: OneLine | None = Field(
        None, description="3.11 or later, on the batch node. Default: as python"
    )
    environment: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], OneLine],
        AfterValidator(without_ranks),
    ] = Field({}, description="For the ranks: NCCL and the fabric")
    inherit: list[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*\*?$")]] = Field(
        [],
        description="Variables that jobs take from the shell where submit is typed, such as "
        "WANDB_API_KEY or SITE_*; PATH and the names of the user they always take",
    )
    shared_folders: list[OneLine] = Field(
        [], description="Where every node sees the same files; a run folder must lie in one"
    )
    node_local: Annotated[OneLine, AfterValidator(absolute_on_a_node)] | None = Field(
        None,
        description="On each node's own disk, such as $TMPDIR: a save is written there first and "
        "carried to the run folder from there",
    )
    write_gib_per_s: float | None = Field(
        None,
        gt=0,
        description="Of all nodes to the run folder, for a save's time before it is known",
    )


@dataclass(frozen=True)
class LoadedProfile:
    """A profile, and where each of its settings was written."""

    values: Profile
    file: Path
    places: dict[KeyPath, str]

    def refuse(self, path: str, message: str) -> RecipeError:
        """The error for one setting that cannot be, with its line."""
        return refusal([Problem(tuple(path.split(".")), message)], self.places)


def load_profile(path: str | Path) -> LoadedProfile:
    """Read a profile. Raises ``RecipeError`` that lists everything wrong in it, with its line."""
    profile, places = load_section(Profile, path, what="profile")
    return LoadedProfile(profile, Path(path), places)
