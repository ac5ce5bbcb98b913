"""What every rank runs: ``python -m launch.worker RECIPE``, started by us, torchrun or Slurm.

Rank and world size come from the environment, as torchrun or ``srun`` sets them. Exit code 0 means
complete or stopped cleanly, 1 failed, 2 wrong input; what to do next says the incarnation's record.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from launch.failure import Story
from launch.meeting import Place, excuse, join
from launch.slurm.placement import Misplaced, check_placement
from launch.slurm.submission import Submission
from megatron_curr.durable import write_durably
from megatron_curr.errors import UserError
from megatron_curr.incarnation.surroundings import Surroundings, crowded_nodes, describe_ranks
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.console import log_to_file, log_to_user
from megatron_curr.training.signals import StopSignals, die_with_parent

if TYPE_CHECKING:
    from megatron_curr.recipe.schema import RunRecipe
    from megatron_curr.training.life import Life
    from megatron_curr.training.preflight import Prepared

log = logging.getLogger("launch.worker")  # the module itself runs as __main__


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Train as one rank to the end and leave with its exit code."""
    options = _parse(arguments)
    signals = StopSignals()
    if options.parent is not None:
        die_with_parent(options.parent)
    signals.install()  # before the slow imports: a signal that comes meanwhile is not lost
    submission = options.submission and Submission.read(options.submission)
    run_rank(
        lambda place: _train(options, place, signals, submission),
        failures=options.failures,
        launcher=submission and submission.launcher,
    )


def run_rank(
    work: Callable[[Place], None], *, failures: Path | None, launcher: str | None = None
) -> NoReturn:
    """Do one rank's work and leave with its exit code; a failure is told before.

    torch is not imported yet: it reads its share of the cores when it is.
    """
    place = Place.from_environment(launcher=launcher)
    # The launcher tells of a crash; without one it goes where all output goes.
    crash = (failures / f"{place.rank}.crash").open("w") if failures else sys.stderr
    faulthandler.enable(file=crash)
    log_to_user(place.rank)
    if not os.access(os.environ.get("TMPDIR", "/"), os.F_OK):  # another node's
        del os.environ["TMPDIR"]
    share = max(len(os.sched_getaffinity(0)) // place.local_world_size, 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    # Threads that wait spin; where other programs want the same cores that makes a step several
    # times slower (measured: 15 s instead of 5 s).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.filterwarnings("ignore", module="megatron|torch.distributed")
    code = 0
    try:
        work(place)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:  # who calls sys.exit has failed as well
        code = 2 if isinstance(error, UserError) else 1
        _tell(error, place, failures)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    # After a failure the other ranks may be gone: nothing collective, no waiting for threads.
    os._exit(code)


def _train(
    options: argparse.Namespace, place: Place, signals: StopSignals, submission: Submission | None
) -> None:
    from megatron_curr.training.life import begin_life
    from megatron_curr.training.local_copy import local_folder
    from megatron_curr.training.preflight import prepare

    recipe = load_recipe(options.recipe, options.overrides)
    meeting = recipe.folder / "incarnations"
    try:
        prepared = prepare(recipe, place.world_size, looks_at_data=place.rank == 0)
        node_local = local_folder(options.node_local) if options.node_local else None
        if submission is not None and place.rank != 0:
            check_placement(place, submission)
    except (UserError, Misplaced) as error:
        if place.finds_others_by_slurm and place.rank != 0:
            excuse(place, meeting, error)
        raise
    life = None
    if place.rank == 0:
        life = begin_life(prepared.folder, world_size=place.world_size, node=place.node)
    with life.recording() if life else nullcontext():
        if submission is not None and place.rank == 0:  # now that it can be recorded
            check_placement(place, submission)
        join(place, options.rendezvous, meeting_folder=meeting)
        train_prepared(
            prepared,
            place,
            life=life,
            signals=signals,
            stop_at_tokens=options.stop_at_tokens,
            node_local=node_local,
        )


def train_prepared(
    prepared: Prepared,
    place: Place,
    *,
    life: Life | None,
    signals: StopSignals,
    stop_at_tokens: int | None = None,
    node_local: Path | None = None,
) -> None:
    """Train among ranks that have met already, as part of the incarnation rank 0 has claimed.

    Checkpoints go through ``node_local``, a folder on this node's own disk, where one is given.
    Raises what ends the run other than its end. Nothing is collective after a failure.
    """
    import torch
    import torch.distributed as dist

    from megatron_curr.training.life import join_life

    folder = prepared.folder
    number = torch.tensor([life.incarnation.number if life else 0])
    dist.broadcast(number, 0)
    life = life or join_life(
        folder,
        int(number),
        rank=place.rank,
        node=place.node,
        is_first_on_node=place.local_rank == 0,
    )
    with life.recording():
        if place.rank == 0:
            folder.write_records(
                prepared.recipe,
                prepared.ledger,
                life.pen,
                encoders=prepared.encoders,
                data=prepared.data,
            )
        dist.barrier()
        log_path = folder.rank_log(life.incarnation.number, place.rank)
        log_to_file(log_path, also_output=place.rank != 0)
        log.info(
            "%s, incarnation %d, %d threads, torch %s",
            place,
            life.incarnation.number,
            torch.get_num_threads(),
            torch.__version__,
        )
        if place.rank == 0:
            _say_what_changed(prepared)
        with _watched(life, log_path, prepared.recipe, signals):
            _train_watched(
                prepared,
                life,
                signals=signals,
                stop_at_tokens=stop_at_tokens,
                node_local=node_local,
            )


def _say_what_changed(prepared: Prepared) -> None:
    for change in prepared.changes:
        log.info("changed since the last start: %s", change)
    if prepared.is_of_before_amendment:
        newest = prepared.ledger[-1]
        log.info(
            "the recipe is the one from before the run was amended (from token %d on: %s): the "
            "run goes on as amended, by %s",
            newest.edition.from_tokens,
            newest.reason,
            prepared.folder.ledger,
        )


def _train_watched(
    prepared: Prepared,
    life: Life,
    *,
    signals: StopSignals,
    stop_at_tokens: int | None,
    node_local: Path | None,
) -> None:
    import torch.distributed as dist

    from megatron_curr.convert.load import first_weights
    from megatron_curr.training.build import build_run, say_how_it_ended
    from megatron_curr.training.loop import train
    from megatron_curr.training.node_checks import check_nodes

    write_nodes(life)
    check_nodes(prepared, life, node_local=node_local)
    with build_run(
        prepared,
        life=life,
        signals=signals,
        stop_at_tokens=stop_at_tokens,
        open_first_weights=partial(first_weights, prepared.recipe, vocab_size=prepared.vocab_size),
        node_local=node_local,
    ) as run:
        train(run)
        dist.barrier()
        if life.rank == 0:
            run.write_beat()
            say_how_it_ended(run)
            life.conclude(prepared.folder.path, *run.ending)


@contextmanager
def _watched(life: Life, log_path: Path, recipe: RunRecipe, signals: StopSignals) -> Iterator[None]:
    from megatron_curr.training.watchdog import Watchdog

    watchdog = Watchdog(
        life,
        log_path,
        signals=signals,
        step_multiple=recipe.training.hang_step_multiple,
        least_s=recipe.training.hang_least_s,
    )
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


def write_nodes(life: Life) -> None:
    """Rank 0 writes down which ranks run where, and what they find around them. Collective."""
    import torch.distributed as dist

    around = Surroundings.of_this_process()
    log.info("%s; %s", around, ", ".join("=".join(pair) for pair in around.variables.items()))
    found: list[tuple[str, Surroundings]] = [(life.node, around)] * dist.get_world_size()
    dist.all_gather_object(found, (life.node, around))
    if life.rank != 0:
        return
    by_node: dict[str, list[int]] = {}
    for rank, (node, _) in enumerate(found):
        by_node.setdefault(node, []).append(rank)
    record = describe_ranks(found)
    folder = life.incarnation.folder
    write_durably(folder / "nodes.json", json.dumps(by_node) + "\n")
    write_durably(folder / "surroundings.json", json.dumps(record, indent=1) + "\n")
    for sentence in crowded_nodes(found):
        log.warning("%s: steps will be slow; look for what binds them (%s)", sentence, folder)


def _tell(error: BaseException, place: Place, failures: Path | None) -> None:
    """Say what ended this rank: to the launcher, which prints the first failure, or to the user."""
    from megatron_curr.training.life import lost_contact

    is_expected = isinstance(error, UserError) or getattr(error, "is_plain", False)
    text = str(error) if is_expected else "".join(traceback.format_exception(error))
    log.debug("%s ended", place, exc_info=error)
    if failures is None:
        print(f"error: {text}", file=sys.stderr)
        return
    Story(
        rank=place.rank,
        at_s=time.time(),
        text=text,
        is_expected=is_expected,
        is_echo=lost_contact(error),
    ).write(failures)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launch.worker", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--stop-at", dest="stop_at_tokens", type=int)
    parser.add_argument(
        "--node-local", help="folder on each node's own disk, of this run alone; may name variables"
    )
    parser.add_argument("--submission", type=Path, help="file of the Slurm submission")
    parser.add_argument("--rendezvous", help="file:// address where local ranks meet")
    parser.add_argument("--failures", type=Path, help="folder in which a failing rank says why")
    parser.add_argument("--parent", type=int, help="process whose death ends this one")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
