"""Rules of a video recipe: buckets that exist, lots that the ranks can share, layouts it admits."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_curr.recipe.problems import Problem, did_you_mean
from megatron_curr.recipe.video_schema import VideoRecipe
from megatron_curr.recipe.wording import divisors, use

_ONLY_TEXT = {
    "virtual_pipeline_model_parallel_size": "micro-batches of several shapes do not interleave",
    "num_layers_in_first_pipeline_stage": "its stages are even",
    "num_layers_in_last_pipeline_stage": "its stages are even",
    "expert_tensor_parallel_size": "it has no experts",
}


def video_problems(recipe: VideoRecipe) -> list[Problem]:
    """Every rule of its own that a video recipe breaks, whatever its layout."""
    return [*_source_buckets(recipe), *_bucket_sizes(recipe), *_channels(recipe)]


def video_layout_problems(recipe: VideoRecipe) -> Iterator[Problem]:
    """Settings of the layout that a video model has no use for."""
    parallel = recipe.parallel
    for field, why in _ONLY_TEXT.items():
        if getattr(parallel, field) is not None:
            yield Problem(("parallel", field), f"is for text: in a video run {why}; leave it out")
    if parallel.expert_model_parallel_size > 1:
        yield Problem(
            ("parallel", "expert_model_parallel_size"),
            f"found {parallel.expert_model_parallel_size}; a video model has no experts; use 1",
        )


def lots_over_ranks(recipe: VideoRecipe, dp_size: int) -> Iterator[Problem]:
    """All data-parallel ranks take as many samples of every lot."""
    used = {name for source in recipe.data.sources.values() for name in source.buckets}
    for name, bucket in recipe.data.buckets.items():
        if name in used and bucket.batch_samples % dp_size:
            yield Problem(
                ("data", "buckets", name, "batch_samples"),
                f"found {bucket.batch_samples}; {dp_size} data-parallel ranks share every lot, so "
                f"it must be a multiple of {dp_size}, {use(bucket.batch_samples, dp_size)}; or use "
                f"{divisors(bucket.batch_samples)} data-parallel ranks",
            )


def _source_buckets(recipe: VideoRecipe) -> Iterator[Problem]:
    known = list(recipe.data.buckets)
    for name, source in recipe.data.sources.items():
        for index, bucket in enumerate(source.buckets):
            path = ("data", "sources", name, "buckets", index)
            if bucket not in recipe.data.buckets:
                yield Problem(
                    path,
                    f"no bucket {bucket!r} in data.buckets; "
                    f"{did_you_mean(bucket, known, what='buckets')}",
                )
            elif bucket in source.buckets[:index]:
                yield Problem(path, f"{bucket!r} is listed twice; take one out")


def _bucket_sizes(recipe: VideoRecipe) -> Iterator[Problem]:
    _, *sides = recipe.data.compression
    for name, bucket in recipe.data.buckets.items():
        for what, side in zip(("height", "width"), sides, strict=True):
            if (found := getattr(bucket, what)) < side:
                yield Problem(
                    ("data", "buckets", name, what),
                    f"found {found}; a latent stands for {side} pixels, so use {side} or more",
                )


def _channels(recipe: VideoRecipe) -> Iterator[Problem]:
    model = recipe.model
    if model.out_channels < model.in_channels:
        yield Problem(
            ("model", "out_channels"),
            f"found {model.out_channels}; the first in_channels {model.in_channels} of them are "
            f"the velocity, so use {model.in_channels} or more",
        )
