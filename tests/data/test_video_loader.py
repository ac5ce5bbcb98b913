"""Batches of video: what is in them depends on the position alone, and ranks have equal work."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_curr.curriculum.ledger import open_ledger
from megatron_curr.data.video_data import build_video_order, open_video_data
from megatron_curr.data.video_loader import (
    HELDOUT_TIMESTEPS,
    LotReader,
    VideoBatch,
    VideoLoader,
    heldout_batches,
)
from megatron_curr.errors import DataError
from megatron_curr.plan.video_flops import sample_flops
from megatron_curr.recipe.video_model import VideoDiT
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.training.video_evaluate import VideoEvaluator
from tests.data.video_folders import write_drawn_folder
from tests.training.tiny_video import (
    BUCKETS,
    CODEC,
    TEXT,
    video_recipe_values,
    write_video_corpus,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("video")
    write_video_corpus(folder)
    return folder


class Opened:
    """The tiny recipe with its data."""

    def __init__(self, corpus: Path, **objective: object) -> None:
        values = video_recipe_values(corpus, corpus / "run")
        self.recipe = VideoRecipe.model_validate({**values, "objective": objective})
        self.data = open_video_data(self.recipe)
        self.order = build_video_order(self.recipe, self.data, open_ledger(self.recipe.curriculum))

    def loader(self, **where: int) -> VideoLoader:
        schedule = self.order.schedule
        where = {"dp_rank": 0, "dp_size": 1, **where}
        return VideoLoader(self.recipe, schedule, self.order, self.data.train, **where)

    def run(self, num_steps: int = 100, **where: int) -> list[list[VideoBatch]]:
        steps, clock = [], 0
        with self.loader(**where) as loader:
            while clock < self.order.schedule.total_tokens and len(steps) < num_steps:
                plan = self.order.schedule.at(clock)
                steps.append(loader.take(plan))
                clock = plan.next_consumed_tokens
        return steps


@pytest.fixture(scope="module")
def opened(corpus: Path) -> Opened:
    return Opened(corpus)


def by_id(batches: list[VideoBatch]) -> dict[int, list[torch.Tensor]]:
    """All that belongs to a sample, by its id; texts without their padding."""
    found = {}
    for batch in batches:
        for row, sample_id in enumerate(batch.sample_ids_B.tolist()):
            columns = [getattr(batch, field.name)[row] for field in fields(batch)]
            columns[2] = columns[2][: columns[3]]
            found[sample_id] = columns
    return found


@pytest.mark.parametrize("dp_size", [2, 4])
def test_ranks_read_the_samples_that_one_rank_reads(opened: Opened, dp_size: int) -> None:
    whole = opened.run()
    shares = [opened.run(dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
    for number, step in enumerate(whole):
        parts = [batch for share in shares for batch in share[number]]
        ours, theirs = by_id(parts), by_id(step)
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(a, b) for key in ours for a, b in zip(ours[key], theirs[key], strict=True)
        )


def test_every_micro_batch_has_one_shape_on_all_ranks_and_alike_texts(opened: Opened) -> None:
    """Model FLOPs of ranks differ by their texts only: by 5 % at most, in sizes of the 10B model.

    An image of 4 patches stands for one of 1,024, a text of 9 tokens for one of 270.
    """
    model = VideoDiT(preset="dit_10b")
    shares = [opened.run(dp_rank=rank, dp_size=4) for rank in range(4)]
    for steps in zip(*shares, strict=True):
        for batches in zip(*steps, strict=True):
            assert len({batch.latents_BCTYX.shape for batch in batches}) == 1
            patches = 256 * batches[0].latents_BCTYX[0, 0].numel() // 4
            flops = [
                sample_flops(model, num_patches=patches, text_tokens=30 * batch.text_BLE.shape[1])
                for batch in batches
            ]
            assert max(flops) <= 1.05 * min(flops)


def test_second_visit_of_a_clip_has_other_noise_timestep_and_frames(opened: Opened) -> None:
    cell = 0
    visits = opened.order.visits_of(cell, 3)
    assert len(visits) >= 2
    reader = LotReader(opened.recipe, opened.order, opened.data.train, dp_rank=0, dp_size=1)
    rows = []
    for position, place in visits[:2].tolist():
        lot = opened.order.lot(position)
        found = by_id(list(reader.read(lot)))
        rows.append(found[int(lot.sample_ids[place])])
    (first_x, first_target, *_), (second_x, second_target, *_) = rows
    assert rows[0][4] != rows[1][4]  # timesteps
    # Clean latents are equal: target = clean - noise, x = clean - t * (clean - noise) at x0-noise.
    cleans = [row[0] + row[4] / 1000 * row[1] for row in rows]
    assert torch.allclose(*cleans, atol=1e-5)
    assert not torch.allclose(first_target, second_target)
    assert not torch.allclose(first_x, second_x)


def test_timesteps_of_ranks_are_different_draws(opened: Opened) -> None:
    """Where every rank draws from one global seed, all of them train on the same timesteps."""
    ranks = [opened.run(dp_rank=rank, dp_size=2) for rank in range(2)]
    drawn = [torch.cat([batch.timesteps_B for step in steps for batch in step]) for steps in ranks]
    assert len(drawn[0]) == len(drawn[1])
    together = torch.cat(drawn)
    assert len(together.unique()) == len(together)


def test_dropped_captions_are_the_recorded_empty_one(corpus: Path) -> None:
    dropped = Opened(corpus, caption_dropout=1.0).run(1)[0]
    assert all(batch.text_lengths_B.tolist() == [1] * len(batch.fps_B) for batch in dropped)
    assert not any(batch.text_BLE.any() for batch in dropped)


def test_images_weigh_less(opened: Opened) -> None:
    for batch in opened.run(1)[0]:
        is_image = batch.latents_BCTYX.shape[2] == 1
        weight = 0.3 if is_image else 1.0
        assert batch.loss_weight_B.tolist() == pytest.approx([weight] * len(batch.fps_B))


def test_resume_in_the_middle_reads_what_an_unbroken_run_reads(opened: Opened) -> None:
    whole = opened.run(6)
    schedule = opened.order.schedule
    clock = sum(schedule.at(0).step_tokens for _ in range(1))
    with opened.loader() as loader:
        again = loader.take(schedule.at(clock))
    ours, theirs = by_id(again), by_id(whole[1])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key][0], theirs[key][0]) for key in ours)


def test_heldout_samples_count_once_over_ranks_at_every_timestep(opened: Opened) -> None:
    cells, heldout = opened.order.cells, opened.data.heldout
    seen, shapes = [], []
    for rank in range(4):
        batches = list(heldout_batches(opened.recipe, cells, heldout, dp_rank=rank, dp_size=4))
        shapes.append([batch.latents_BCTYX.shape for batch in batches])
        for batch in batches:
            counted = batch.counted_B.bool()
            ids, times = batch.sample_ids_B[counted], batch.timesteps_B[counted]
            groups = batch.group_B[counted]
            seen += list(zip(groups.tolist(), ids.tolist(), times.tolist(), strict=True))
    assert len(set(seen)) == len(seen) and len({tuple(shape) for shape in shapes}) == 1
    whole = list(heldout_batches(opened.recipe, cells, heldout))
    assert len(seen) == sum(int(batch.counted_B.sum()) for batch in whole)
    assert {time for _, _, time in seen} == {1000 * t for t in HELDOUT_TIMESTEPS}


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("model.in_channels", 3, "latent channels 4, but the recipe says 3"),
        ("data.compression", [4, 8, 8], "compression .8, 8, 8., but the recipe says .4, 8, 8."),
        ("model.text_hidden_size", 18, "text features of width 12, but the recipe says 18"),
        ("model.max_text_tokens", 5, "a text has 9 tokens, more than model.max_text_tokens=5"),
        ("data.buckets.clip.num_frames", 48, "bucket 'clip' is .32, 32, 24."),
        ("data.sources.films.buckets", ["clip", "image"], "no sample of bucket 'image'"),
    ],
)
def test_shards_of_another_codec_or_shape_are_refused(
    corpus: Path, place: str, value: object, message: str
) -> None:
    values = video_recipe_values(corpus, corpus / "run")
    *sections, last = place.split(".")
    target = values
    for section in sections:
        target = target[section]
    target[last] = value
    with pytest.raises(DataError, match=message):
        open_video_data(VideoRecipe.model_validate(values))


@pytest.mark.parametrize("side", ["train", "heldout"])
@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"codec": {"std": (2.0,) * 4}}, "made with codec .* whose std differ"),
        ({"codec": {"sha256": "f" * 64}}, "made with codec .* whose sha256 differ"),
        ({"text": {"sha256": "f" * 64}}, "made with text_encoder .* whose sha256 differ"),
    ],
)
def test_shards_of_another_normalisation_or_encoder_than_the_others_are_refused(
    corpus: Path, tmp_path: Path, side: str, record: dict[str, dict[str, Any]], message: str
) -> None:
    """Latents of one size, so that nothing but the record tells."""
    films = {name: BUCKETS[name] for name in ("clip", "wide")}
    made_by = {
        "codec": dataclasses.replace(CODEC, **record.get("codec", {})),
        "text": dataclasses.replace(TEXT, **record.get("text", {})),
    }
    write_drawn_folder(tmp_path / "films", dict.fromkeys(films, 20), buckets=films, **made_by)
    values = video_recipe_values(corpus, corpus / "run")
    key = {"train": "shards", "heldout": "heldout"}[side]
    values["data"]["sources"]["films"][key] = str(tmp_path / "films")
    with pytest.raises(DataError, match=message):
        open_video_data(VideoRecipe.model_validate(values))


def test_heldout_shards_may_lack_a_bucket_and_it_is_said_once(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts, shapes = {"image": 5, "clip": 0}, {name: BUCKETS[name] for name in ("image", "clip")}
    write_drawn_folder(tmp_path / "held", counts, buckets=shapes, codec=CODEC, text=TEXT)
    values = video_recipe_values(corpus, corpus / "run")
    values["data"]["sources"]["shapes"]["heldout"] = str(tmp_path / "held")
    recipe = VideoRecipe.model_validate(values)
    data = open_video_data(recipe)
    order = build_video_order(recipe, data, open_ledger(recipe.curriculum))
    groups = {
        order.cells[group // len(HELDOUT_TIMESTEPS)].name
        for batch in heldout_batches(recipe, order.cells, data.heldout)
        for group in batch.group_B.tolist()
    }
    assert groups == {"shapes/image", "films/clip", "films/wide"}
    with caplog.at_level(logging.WARNING):
        evaluator = VideoEvaluator(recipe, order.cells, data.heldout, groups=None)
    assert evaluator.has_sources
    assert [record.getMessage() for record in caplog.records] == [
        "no held-out sample of shapes/clip: not evaluated (preprocess-video holds more files out "
        "with a higher --heldout-frac)"
    ]


def test_heldout_shards_that_preprocessing_did_not_write_are_named_with_what_helps(
    corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus / "films" / "train", tmp_path / "films" / "train")
    values = video_recipe_values(corpus, corpus / "run")
    values["data"]["sources"]["films"]["heldout"] = str(tmp_path / "films" / "heldout")
    with pytest.raises(DataError, match=r"films\.heldout: .*raise its --heldout-frac"):
        open_video_data(VideoRecipe.model_validate(values))


def test_shares_hold_equally_many_samples(opened: Opened) -> None:
    for step in opened.run(3, dp_rank=1, dp_size=2):
        for batch in step:
            assert np.ptp(batch.text_lengths_B.numpy()) <= 9
            assert len(batch.fps_B) * batch.latents_BCTYX[0, 0].numel() // 4 <= 48
