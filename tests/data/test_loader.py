"""The loader: the right samples on every rank, in order, ahead of time, and gone when closed."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_curr.curriculum.schedule import Schedule, StepPlan, build_schedule
from megatron_curr.data.loader import Loader, heldout_batches, num_heldout_batches
from megatron_curr.data.order import SampleOrder
from megatron_curr.data.shards import ShardSet, open_shards
from megatron_curr.errors import DataError, RecipeError
from megatron_curr.recipe.schema import Recipe
from tests.data.corpora import recipe, write_shard, write_source


class Run:
    """A recipe with its schedule, order and shards."""

    def __init__(self, root: Path, **data: object) -> None:
        self.recipe: Recipe = recipe(root, **data)
        self.schedule: Schedule = build_schedule(self.recipe.curriculum)
        self.shards: dict[str, ShardSet] = {
            name: open_shards(source.shards, name=name)
            for name, source in self.recipe.data.sources.items()
        }
        self.order = SampleOrder(
            self.schedule,
            {name: shard_set.num_tokens for name, shard_set in self.shards.items()},
            seed=7,
            sources=self.recipe.data.sources,
        )

    def loader(self, **settings: object) -> Loader:
        ranks = {"dp_rank": 0, "dp_size": 1, "micro_batch_tokens": 64, **settings}
        return Loader(self.recipe, self.schedule, self.order, self.shards, **ranks)

    def plans(self) -> list[StepPlan]:
        plans, clock = [], 0
        while clock < self.schedule.total_tokens:
            plans.append(self.schedule.at(clock))
            clock = plans[-1].next_consumed_tokens
        return plans


@pytest.fixture
def run(tmp_path: Path) -> Run:
    write_source(tmp_path / "prose", 6000)
    write_source(tmp_path / "code", 6000, first_id=500)
    return Run(tmp_path)


def reader_threads() -> int:
    return sum(thread.name == "read-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("dp_size", [1, 2])
def test_the_ranks_together_read_every_sample_of_the_order_once(run: Run, dp_size: int) -> None:
    loaders = [run.loader(dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    seen = []
    for plan in run.plans():
        for loader in loaders:
            for batch in loader.take(plan):
                assert batch.tokens_BS.shape == (64 // plan.seq_length, plan.seq_length)
                assert batch.tokens_BS.dtype == batch.labels_BS.dtype == torch.int64
                assert batch.loss_mask_BS.dtype == torch.float32 and batch.document_ids_BS is None
                assert batch.seq_length == plan.seq_length
                assert_tokens_are_the_samples(run, batch)
                seen += batch.positions_B.tolist()
    for loader in loaders:
        loader.close()
    assert seen == list(range(run.schedule.total_samples))


def assert_tokens_are_the_samples(run: Run, batch) -> None:
    samples = run.order.lookup(batch.positions_B.numpy())
    assert samples.source.tolist() == batch.source_index_B.tolist()
    for row, (source, first) in enumerate(zip(samples.source, samples.first_token, strict=True)):
        shard_set = run.shards[run.order.sources[source]]
        window = shard_set.read(int(first), batch.seq_length + 1).astype(np.int64)
        assert batch.tokens_BS[row].tolist() == window[:-1].tolist()
        assert batch.labels_BS[row].tolist() == window[1:].tolist()


def test_what_is_read_does_not_depend_on_the_prefetch(run: Run) -> None:
    plans = run.plans()[:20]
    with run.loader() as loader:
        in_a_row = [[batch.tokens_BS for batch in loader.take(plan)] for plan in plans]
    with run.loader(prefetched_steps=1) as loader:
        for number in (13, 3, 4, 4, 19, 0):  # jumps, a repeat, a lucky guess
            again = [batch.tokens_BS for batch in loader.take(plans[number])]
            assert all(torch.equal(*pair) for pair in zip(again, in_a_row[number], strict=True))


def test_a_plan_that_differs_from_the_guess_is_the_one_that_counts(run: Run) -> None:
    first, second = run.plans()[:2]
    with run.loader() as loader:
        loader.take(first)
        shorter = replace(second, num_samples=4)
        batches = loader.take(shorter)
        assert torch.cat([batch.positions_B for batch in batches]).tolist() == [8, 9, 10, 11]


def test_the_last_step_ends_without_reading_on(run: Run) -> None:
    with run.loader() as loader:
        assert loader.take(run.plans()[-1])
        assert loader.last_wait_s >= 0


def test_closing_stops_the_thread_and_twice_is_fine(run: Run) -> None:
    before = reader_threads()
    with run.loader() as loader:
        loader.take(run.plans()[0])
        assert reader_threads() == before + 1
    assert reader_threads() == before
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.take(run.plans()[5])


def test_a_loader_nobody_holds_stops_by_itself(run: Run) -> None:
    before = reader_threads()
    loader = run.loader()
    loader.take(run.plans()[0])
    del loader
    assert reader_threads() == before


def test_an_open_loader_does_not_keep_the_process_alive(run: Run, tmp_path: Path) -> None:
    program = (
        "from tests.data.test_loader import Run\n"
        "from pathlib import Path\n"
        f"run = Run(Path({str(tmp_path)!r}))\n"
        "loader = run.loader()\n"
        "print(len(loader.take(run.plans()[0])))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr


def test_an_error_in_the_thread_is_raised_where_the_step_is_taken(tmp_path: Path) -> None:
    write_source(tmp_path / "prose", 6000)
    write_source(tmp_path / "code", 6000, first_id=500)
    run = Run(tmp_path)
    with run.loader(vocab_size=500) as loader:
        with pytest.raises(DataError, match=r"code_0000\d\.bin: token .* has id"):
            for plan in run.plans():
                loader.take(plan)
        with pytest.raises(DataError):
            loader.take(plan)
        assert loader.take(run.plans()[0])


def test_a_step_that_does_not_split_is_refused(run: Run) -> None:
    with (
        run.loader(dp_size=3) as loader,
        pytest.raises(RecipeError, match=r"8 samples of 16 tokens .* on 3 data-parallel ranks"),
    ):
        loader.take(run.plans()[0])


def test_isolation_follows_the_recipe(run: Run, tmp_path: Path) -> None:
    isolated = Run(tmp_path, isolate_documents=True)
    with isolated.loader() as loader:
        batch = loader.take(isolated.plans()[0])[0]
    assert batch.document_ids_BS is not None
    assert batch.document_ids_BS.max() > 0
    assert batch.loss_mask_BS.sum() < batch.loss_mask_BS.numel()


@pytest.mark.parametrize(
    ("num_tokens", "seq_length", "micro_batch_tokens", "dp_size"),
    [(100, 8, 16, 1), (100, 8, 16, 2), (64, 8, 16, 4), (10**6, 16, 64, 3), (5, 8, 8, 2)],
)
def test_every_heldout_label_counts_once(
    tmp_path: Path, num_tokens: int, seq_length: int, micro_batch_tokens: int, dp_size: int
) -> None:
    stream = list(range(1, 301))
    shards = open_shards(write_shard(tmp_path / "a", [stream[:120], stream[120:]]))
    settings = {
        "seq_length": seq_length,
        "num_tokens": num_tokens,
        "micro_batch_tokens": micro_batch_tokens,
        "dp_size": dp_size,
    }
    ranks = [list(heldout_batches(shards, dp_rank=rank, **settings)) for rank in range(dp_size)]
    assert {len(batches) for batches in ranks} == {num_heldout_batches(shards, **settings)}
    labels = []
    for batch in (batch for batches in ranks for batch in batches):
        assert batch.tokens_BS.shape == (micro_batch_tokens // seq_length, seq_length)
        labels += batch.labels_BS[batch.loss_mask_BS == 1].tolist()
    assert labels == stream[1 : min(num_tokens, 299) + 1]
