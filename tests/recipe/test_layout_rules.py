"""Rules of uneven pipelines, overlapped communication and recompute."""

from pathlib import Path

import pytest

from tests.recipe.recipes import only_refusal, sound_recipe

PIPELINE = "parallel.pipeline_model_parallel_size"
FIRST_STAGE = "parallel.num_layers_in_first_pipeline_stage"
LAST_STAGE = "parallel.num_layers_in_last_pipeline_stage"


@pytest.mark.parametrize(
    "overrides",
    [
        [f"{PIPELINE}=3", f"{FIRST_STAGE}=2"],
        [f"{PIPELINE}=2", f"{LAST_STAGE}=1"],
        [f"{PIPELINE}=2", f"{FIRST_STAGE}=3", f"{LAST_STAGE}=1"],
        [f"{PIPELINE}=4", "model.num_layers=7", f"{FIRST_STAGE}=2", f"{LAST_STAGE}=1"],
    ],
)
def test_uneven_stages_may_leave_an_even_rest(tmp_path: Path, overrides: list[str]) -> None:
    sound_recipe(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "place", "complaint"),
    [
        (
            [f"{PIPELINE}=3", f"{FIRST_STAGE}=1"],
            FIRST_STAGE,
            "num_layers_in_first_pipeline_stage 1 leave 3 of 4 layers to 2 other stages, which "
            "share them evenly; leave 2 or 4 of them",
        ),
        (
            [f"{PIPELINE}=2", f"{FIRST_STAGE}=1", f"{LAST_STAGE}=1"],
            FIRST_STAGE,
            "num_layers_in_first_pipeline_stage 1 and num_layers_in_last_pipeline_stage 1 leave 2 "
            "of 4 layers to 0 other stages, which share them evenly; leave none",
        ),
        (
            [f"{PIPELINE}=2", f"{LAST_STAGE}=4"],
            LAST_STAGE,
            "num_layers_in_last_pipeline_stage 4 leave 0 of 4 layers to 1 other stages, which "
            "share them evenly; leave 1 or 2 of them",
        ),
        (
            [f"{LAST_STAGE}=4"],
            LAST_STAGE,
            "needs pipeline_model_parallel_size above 1; leave it out on one stage",
        ),
        (
            [
                f"{PIPELINE}=2",
                f"{LAST_STAGE}=1",
                "parallel.virtual_pipeline_model_parallel_size=2",
            ],
            "parallel.virtual_pipeline_model_parallel_size",
            "found 2; does not divide the 1 layers of a stage "
            "(num_layers_in_last_pipeline_stage); use 1",
        ),
    ],
)
def test_uneven_stages_that_do_not_add_up_are_refused(
    tmp_path: Path, overrides: list[str], place: str, complaint: str
) -> None:
    assert only_refusal(tmp_path, *overrides) == f"{place}: {complaint}"


def test_gathering_weights_late_needs_the_distributed_optimizer(tmp_path: Path) -> None:
    late = "parallel.overlap_param_gather=true"
    line = only_refusal(tmp_path, late)
    assert line.endswith("true needs use_distributed_optimizer: true; set one of the two")
    line = only_refusal(tmp_path, "parallel.use_distributed_optimizer=true", late)
    assert line.endswith("true needs overlap_grad_reduce: true as well; set it")


@pytest.mark.parametrize(
    ("setting", "granularity"),
    [
        ("recompute_num_layers=2", "full"),
        ("recompute_method=block", "full"),
        ("recompute_modules=[mlp]", "selective"),
    ],
)
def test_details_of_recompute_belong_to_their_granularity(
    tmp_path: Path, setting: str, granularity: str
) -> None:
    line = only_refusal(tmp_path, f"parallel.{setting}")
    assert line.endswith(
        f"is for recompute_granularity: {granularity} only, which is not set; set that, or leave "
        "this out"
    )
    sound_recipe(tmp_path, f"parallel.recompute_granularity={granularity}", f"parallel.{setting}")


def test_units_of_recompute_make_up_what_a_rank_holds(tmp_path: Path) -> None:
    full = ("parallel.recompute_granularity=full", "parallel.recompute_num_layers=3")
    line = only_refusal(tmp_path, *full)
    assert line.endswith(
        "found 3; a rank holds 4 layers at a time, which whole units make up "
        "(recompute_method uniform): use 1, 2 or 4"
    )
    uneven = (f"{PIPELINE}=2", f"{FIRST_STAGE}=1")
    assert "a rank holds 1 or 3 layers" in only_refusal(tmp_path, *full, *uneven)
    sound_recipe(tmp_path, *full, "parallel.recompute_method=block")
    sound_recipe(tmp_path, full[0], "parallel.recompute_num_layers=2", f"{PIPELINE}=2")
