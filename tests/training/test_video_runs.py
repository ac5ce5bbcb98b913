"""Whole video runs: exact and elastic resume, the average of the weights, layouts that agree."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import yaml

from megatron_curr.cli import main
from megatron_curr.errors import CheckpointError
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.report.build import build_report
from megatron_curr.training.parity import differences
from megatron_curr.training.parity_verdict import WEIGHTS
from megatron_curr.training.preflight import prepare
from tests.ranks import run_ranks
from tests.recipe.recipes import with_keys_shuffled
from tests.training.runs import newest_tensors, rows, train_rank, verified_steps
from tests.training.tiny import write_recipe
from tests.training.tiny_video import (
    CHANNELS,
    CODEC,
    TEXT,
    video_recipe_values,
    write_video_corpus,
)

LOSS = "train/flow_mse"
TOLERANCE, NUM_STEPS = 2e-5, 4
INSIDE_RAMP = 1900  # not where a checkpoint is due
DP2 = {"parallel.use_distributed_optimizer": True}
TP2 = {"parallel.tensor_model_parallel_size": 2, "parallel.sequence_parallel": True}


class VideoRuns:
    """Makes runs of one corpus, each in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_video_corpus(folder / "corpus")

    def recipe(self, name: str, changes: dict[str, Any] | None = None) -> Path:
        """The recipe of run ``name``, with changes by dotted path."""
        values = copy.deepcopy(video_recipe_values(self.folder / "corpus", self.folder / name))
        for path, value in (changes or {}).items():
            *sections, last = path.split(".")
            target = values
            for section in sections:
                target = target[section]
            target[last] = value
        return write_recipe(self.folder / f"{name}.yaml", values)

    def train(
        self,
        name: str,
        *,
        ranks: int = 1,
        changes: dict[str, Any] | None = None,
        stop_at_tokens: int | None = None,
    ) -> Path:
        """Start or resume run ``name``; returns its folder."""
        run_ranks(train_rank, ranks, str(self.recipe(name, changes)), ranks, stop_at_tokens)
        return self.folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> VideoRuns:
    return VideoRuns(tmp_path_factory.mktemp("video_runs"))


@pytest.fixture(scope="module")
def unbroken(runs: VideoRuns) -> Path:
    return runs.train("unbroken")


@pytest.fixture(scope="module")
def stopped(runs: VideoRuns) -> Path:
    return runs.train("stopped", stop_at_tokens=INSIDE_RAMP)


def flow_losses(run: Path) -> list[float]:
    return [row[LOSS] for row in rows(run, LOSS)]


def test_resume_on_the_same_layout_is_exact_to_the_bit(
    runs: VideoRuns, unbroken: Path, stopped: Path
) -> None:
    shutil.copytree(stopped, runs.folder / "exact")
    resumed = runs.train("exact")
    assert rows(resumed, LOSS) == rows(unbroken, LOSS)
    assert rows(resumed, "eval/shapes/flow_mse") == rows(unbroken, "eval/shapes/flow_mse")
    assert newest_tensors(resumed) == newest_tensors(unbroken)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"codec": dataclasses.replace(CODEC, mean=(0.5,) * CHANNELS)}, "with another codec, or"),
        ({"text": dataclasses.replace(TEXT, sha256="f" * 64)}, "with another text encoder, or"),
    ],
)
def test_resume_on_shards_of_another_space_is_refused(
    runs: VideoRuns, stopped: Path, record: dict[str, Any], message: str
) -> None:
    """As many samples of the same shapes, all of them encoded anew."""
    corpus = runs.folder / f"corpus_{next(iter(record))}"
    write_video_corpus(corpus, **record)
    values = video_recipe_values(corpus, stopped)
    there, here = runs.folder / "corpus", corpus
    before = sorted(path.name for path in stopped.iterdir())
    for source in values["data"]["sources"]:
        os.rename(there / source, there / f"{source}.old")
        os.symlink(here / source, there / source)
    try:
        with pytest.raises(CheckpointError, match=message):
            prepare(load_recipe(runs.folder / "stopped.yaml"), 1)
    finally:
        for source in values["data"]["sources"]:
            os.unlink(there / source)
            os.rename(there / f"{source}.old", there / source)
    assert prepare(load_recipe(runs.folder / "stopped.yaml"), 1).encoders
    assert sorted(path.name for path in stopped.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [pytest.param(DP2, 2, id="1 to dp2 sharded"), pytest.param(TP2, 2, id="1 to tp2")],
)
def test_resume_on_another_layout_trains_on_the_same_samples(
    runs: VideoRuns,
    unbroken: Path,
    stopped: Path,
    changes: dict[str, Any],
    ranks: int,
    request: pytest.FixtureRequest,
) -> None:
    name = request.node.callspec.id.replace(" ", "_")
    shutil.copytree(stopped, runs.folder / name)
    resumed = runs.train(name, ranks=ranks, changes=changes)
    assert flow_losses(resumed) == pytest.approx(flow_losses(unbroken), abs=1e-4)
    for place in ("data/films/consumed_tokens", "data/wide/bucket_consumed_tokens"):
        assert [row[place] for row in rows(resumed, LOSS)] == [
            row[place] for row in rows(unbroken, LOSS)
        ]
    assert verified_steps(resumed) == len(rows(unbroken, LOSS))
    ours, theirs = _average(resumed), _average(unbroken)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    off = [str(one) for one in differences(WEIGHTS, ours, theirs) if not one.relative <= TOLERANCE]
    assert off == []


def _average(run: Path) -> dict[str, torch.Tensor]:
    """The stored average of the weights, as whole tensors by name."""
    return _stored(run, "optimizer.state.exp_moving_avg.")


def _stored(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    reader = FileSystemReader(newest)
    known = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in known.items()
        if key.startswith(prefix) and hasattr(entry, "size")
    }
    _load_state_dict(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): value for key, value in state.items()}


def test_average_is_what_its_decay_makes_of_the_weights(runs: VideoRuns) -> None:
    """One update after the first weights: decay of the old, the rest of the new."""
    one = {"checkpoint.every_tokens": 1, "checkpoint.keep_last": 5}
    run = runs.train("averaged", changes=one, stop_at_tokens=250)
    folders = sorted((run / "checkpoints").glob("step_*"))
    assert len(folders) >= 2
    stored = []
    for folder in folders[:2]:
        (run / "checkpoints" / "latest").write_text(folder.name)
        weights, average = _stored(run, ""), _average(run)
        stored.append((weights, average))
    (_, before), (weights, after) = stored
    moved = 0
    for name, value in after.items():
        expected = 0.9 * before[name] + 0.1 * weights[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        moved += int(not torch.equal(value, weights[name]))
    assert moved > 20


def test_first_weights_may_be_those_of_another_run(runs: VideoRuns, unbroken: Path) -> None:
    source = shutil.copytree(unbroken, runs.folder / "source")
    begun = {"init_from": f"checkpoint:{source}", "name": "tuned"}
    tuned = runs.train("tuned", changes=begun, stop_at_tokens=1)
    measured = "eval/wide/bucket_flow_mse_t625"
    first, last = rows(tuned, measured)[0], rows(unbroken, measured)[-1]
    assert first["consumed_tokens"] == 0 and first[measured] == last[measured]
    shutil.rmtree(source)  # a run that goes on needs them no more
    runs.train("tuned", changes=begun, stop_at_tokens=1024)
    assert rows(tuned, LOSS)[-1]["consumed_tokens"] >= 1024


def test_report_shows_shapes_and_phases(unbroken: Path) -> None:
    page = build_report(unbroken)
    for text in ("Shapes", "squared error", "small", "large", "wide"):
        assert text in page


def test_no_answer_depends_on_the_order_of_keys(
    unbroken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers() -> list[str | bytes]:
        assert main(["trace", str(run), "--count", "1000", "--json"]) == 0
        assert main(["trace", str(run), "--verify"]) == 0
        assert main(["plan", str(run / "recipe.yaml"), "--gpus-per-node", "1"]) == 0
        return [capsys.readouterr().out, build_report(run)]

    run, random = tmp_path / "run", Random(1)
    shutil.copytree(unbroken, run)
    before = answers()
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    shuffled = write_recipe(tmp_path / "r.yaml", with_keys_shuffled(values, random))
    (run / "recipe.yaml").write_text(dump_recipe(load_recipe(shuffled)))
    lines = [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]
    (run / "ledger.jsonl").write_text(
        "".join(json.dumps(with_keys_shuffled(line, random)) + "\n" for line in lines)
    )
    assert answers() == before


@pytest.fixture(scope="module")
def reference(runs: VideoRuns) -> Path:
    """What one rank observes; beside it the recipe."""
    path = runs.folder / "reference.pt"
    recipe = runs.recipe("parity", {"training.ema_decay": None})
    run_ranks(observe_layouts, 1, str(recipe), ("1",), str(path))
    return path


@pytest.mark.parametrize(
    ("num_ranks", "layouts"),
    [
        pytest.param(2, ("tp2sp", "pp2", "cp2", "dp2do"), id="two ranks"),
        pytest.param(4, ("tp2cp2sp", "pp2cp2"), id="four ranks"),
    ],
)
def test_layouts_train_what_one_rank_does(
    runs: VideoRuns, reference: Path, num_ranks: int, layouts: tuple[str, ...]
) -> None:
    recipe = str(runs.folder / "parity.yaml")
    run_ranks(observe_layouts, num_ranks, recipe, layouts, str(reference))


def observe_layouts(rank: int, recipe: str, layouts: tuple[str, ...], reference: str) -> None:
    """Take steps on each layout; save the reference, or compare with it on rank 0."""
    from megatron_curr.recipe.layout_name import parse_layout
    from megatron_curr.recipe.load import load_recipe
    from megatron_curr.training.parity import Observation, compare, observe
    from megatron_curr.training.preflight import prepare

    loaded = load_recipe(recipe)
    for name in layouts:
        layout = parse_layout(name, loaded)
        observed = observe(prepare(layout.recipe(loaded), layout.num_ranks), NUM_STEPS)
        if name == "1":
            observed.save(Path(reference))
        elif rank == 0:
            verdict = compare(
                observed,
                Observation.load(Path(reference)),
                layout=name,
                num_ranks=layout.num_ranks,
                tolerance=TOLERANCE,
            )
            assert verdict.agrees, verdict.sentence()
