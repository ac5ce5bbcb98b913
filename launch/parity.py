"""``megatron-curr parity``: run a recipe's first steps on several layouts here, and compare them.

The reference goes first and leaves what it observed in a temporary folder; layouts of as many ranks
share their processes. Started as ``python -m launch.parity`` this module is what each rank runs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from launch.local import Crew, print_error
from launch.meeting import Place, join
from launch.worker import run_rank
from megatron_curr.errors import RecipeError
from megatron_curr.recipe.layout_name import ONE_RANK, Layout, check_layouts, parse_layout
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.recipe.schema import Logging, Recipe
from megatron_curr.training.parity_verdict import Verdict, print_table
from megatron_curr.training.preflight import prepare
from megatron_curr.training.signals import die_with_parent

log = logging.getLogger("launch.parity")  # the module itself runs as __main__ on ranks

# fp32 leaves rounding of some 1e-7 a sum; bf16 rounds every activation to 3 digits.
DEFAULT_TOLERANCE = {"fp32": 2e-5, "bf16": 5e-2}
TABLE_WIDTH = 104


@dataclass(frozen=True, kw_only=True)
class Question:
    """What to compare, and how."""

    layouts: tuple[str, ...]
    reference: str = ONE_RANK
    num_steps: int = 3
    precision: str = "fp32"
    tolerance: float | None = None  # default: DEFAULT_TOLERANCE of the precision

    @property
    def largest_allowed(self) -> float:
        """The tolerance that holds."""
        return DEFAULT_TOLERANCE[self.precision] if self.tolerance is None else self.tolerance


def check_parity(
    recipe_path: str | Path, overrides: Sequence[str], question: Question, *, as_json: bool = False
) -> int:
    """Compare, print the table or its JSON, return 0 where all agree and 1 where one does not.

    Raises ``UserError`` before any process starts for what cannot be asked.
    """
    if question.precision not in DEFAULT_TOLERANCE:
        raise RecipeError(
            f"--precision {question.precision}: must be {' or '.join(DEFAULT_TOLERANCE)}"
        )
    recipe = load_recipe(recipe_path, overrides)
    with TemporaryDirectory(prefix="megatron-curr-") as name:
        meeting = Path(name)
        recipe = _recipe_for_parity(recipe, question.precision, meeting)
        reference = parse_layout(question.reference, recipe)
        layouts = [parse_layout(layout, recipe) for layout in question.layouts]
        check_layouts([reference, *layouts], recipe)
        _check_steps(recipe, question)
        (meeting / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        verdicts, code = _run_jobs(question, [[reference], *_jobs(layouts)], meeting)
    _print_result(verdicts, question, recipe=recipe, as_json=as_json)
    return code or int(not all(verdict.agrees for verdict in verdicts))


def _recipe_for_parity(recipe: Recipe, precision: str, meeting: Path) -> Recipe:
    """The recipe as it is but for its precision, away from its run folder and its loggers."""
    training = recipe.training.model_copy(update={"precision": precision})
    return recipe.model_copy(
        update={"training": training, "run_folder": meeting / "run", "logging": Logging()}
    )


def _check_steps(recipe: Recipe, question: Question) -> None:
    """Refuse data that cannot be read, and more steps than the run has."""
    one = parse_layout(ONE_RANK, recipe)
    prepared = prepare(one.recipe(recipe), 1)
    if question.num_steps > prepared.schedule.num_steps:
        raise RecipeError(
            f"--steps {question.num_steps}: the recipe's run has {prepared.schedule.num_steps} "
            f"steps; ask for that many or fewer"
        )


def _jobs(layouts: Sequence[Layout]) -> list[list[Layout]]:
    """Layouts of as many ranks share processes; starting those takes longest."""
    ordered = sorted(layouts, key=lambda layout: layout.num_ranks)
    return [list(job) for _, job in groupby(ordered, key=lambda layout: layout.num_ranks)]


def _run_jobs(
    question: Question, jobs: Sequence[Sequence[Layout]], meeting: Path
) -> tuple[list[Verdict], int]:
    """The verdicts in the order that was asked for, and 0; or those there are, and an exit code."""
    code = 0
    for number, job in enumerate(jobs):
        folder = meeting / f"job_{number}"
        folder.mkdir()
        arguments = [str(meeting), "--parent", str(os.getpid())]
        arguments += ["--failures", str(folder), "--rendezvous", f"file://{folder}/store"]
        arguments += ["--steps", str(question.num_steps)]
        arguments += ["--tolerance", str(question.largest_allowed)]
        for layout in job:
            arguments += ["--layout", layout.name]
        if number == 0:
            arguments.append("--is-reference")
        with Crew(arguments, job[0].num_ranks, folder, module="launch.parity") as crew:
            outcome = crew.wait()
        code = outcome.code
        if outcome.text is not None:
            print_error(outcome.text)
        if code:
            break
    written = {path.name: path for path in meeting.glob("verdict_*.json")}
    names = [_verdict_name(layout) for layout in question.layouts]
    return [
        Verdict.from_json(written[name].read_text(encoding="utf-8"))
        for name in names
        if name in written
    ], code


def _verdict_name(layout: str) -> str:
    return f"verdict_{layout}.json"


def _print_result(
    verdicts: Sequence[Verdict], question: Question, *, recipe: Recipe, as_json: bool
) -> None:
    if as_json:
        result = {
            "recipe": recipe.name,
            "reference": question.reference,
            "num_steps": question.num_steps,
            "precision": question.precision,
            "tolerance": question.largest_allowed,
            "layouts": [
                {"agrees": verdict.agrees, **json.loads(verdict.to_json())} for verdict in verdicts
            ],
        }
        print(json.dumps(result, indent=2))
        return
    against = "one rank" if question.reference == ONE_RANK else question.reference
    if verdicts:
        print_table(
            verdicts,
            title=f"{recipe.name}: largest relative differences from {against}, "
            f"{question.num_steps} steps in {question.precision}, "
            f"tolerance {question.largest_allowed:g}",
            # A log has no width of its own: rich would cut the columns at 80.
            console=Console(width=max(Console().width, TABLE_WIDTH)),
        )
    for verdict in verdicts:
        if not verdict.agrees:
            print(verdict.sentence(), file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one rank of a job to its end and leave with its exit code."""
    options = _parse(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    run_rank(lambda place: _observe_layouts(options, place), failures=options.failures)


def _observe_layouts(options: argparse.Namespace, place: Place) -> None:
    meeting: Path = options.meeting
    recipe = load_recipe(meeting / "recipe.yaml")
    join(place, options.rendezvous)

    from megatron_curr.training.parity import Observation, compare, observe

    reference = meeting / "reference.pt"
    for name in options.layouts:
        layout = parse_layout(name, recipe)
        observed = observe(prepare(layout.recipe(recipe), place.world_size), options.num_steps)
        if place.rank != 0:
            continue
        if options.is_reference:
            observed.save(reference)
            continue
        verdict = compare(
            observed,
            Observation.load(reference),
            layout=name,
            num_ranks=layout.num_ranks,
            tolerance=options.tolerance,
        )
        (meeting / _verdict_name(name)).write_text(verdict.to_json(), encoding="utf-8")
        log.info("%s on %d ranks: %s", name, layout.num_ranks, verdict.in_short)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.parity", description=__doc__)
    parser.add_argument("meeting", type=Path, help="folder with recipe.yaml, for results")
    parser.add_argument("--layout", dest="layouts", action="append", default=[])
    parser.add_argument("--steps", dest="num_steps", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--is-reference", action="store_true", help="others will be compared to it")
    parser.add_argument("--rendezvous", help="file:// address where the ranks meet")
    parser.add_argument("--failures", type=Path, help="folder in which a failing rank says why")
    parser.add_argument("--parent", type=int, help="process whose death ends this one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
