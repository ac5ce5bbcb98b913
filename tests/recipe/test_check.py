from pathlib import Path

import pytest

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.check import check_layout, check_recipe
from megatron_curr.recipe.schema import Recipe
from tests.recipe.recipes import SOUND, only_refusal, refusal_of, sound_recipe

FIRST, SECOND = "curriculum.phases.0", "curriculum.phases.1"


def test_rules_are_checked_on_recipes_made_in_code_as_well(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path)
    check_recipe(recipe)
    parallel = recipe.parallel.model_copy(update={"sequence_parallel": True})
    broken: Recipe = recipe.model_copy(update={"parallel": parallel})
    with pytest.raises(RecipeError, match=r"^parallel\.sequence_parallel: true needs"):
        check_recipe(broken)


def test_every_broken_rule_is_reported_at_once_with_its_place(tmp_path: Path) -> None:
    text = SOUND.replace("name: mixed", "name: short").replace("prose: 3", "proze: 3")
    lines = refusal_of(tmp_path, "parallel.sequence_parallel=true", text=text)
    assert [line.split(":")[0] for line in lines] == [
        "recipe.yaml",
        "recipe.yaml",
        "--set parallel.sequence_parallel=true",
    ]


def test_phase_names_are_unique(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, f"{SECOND}.name=short")
    assert line == (
        f"{SECOND}.name: 'short' is the name of phase 0 already; give every phase a name of its own"
    )


@pytest.mark.parametrize("curve", ["mixture", "global_batch_tokens", "learning_rate"])
def test_first_phase_defines_every_curve(tmp_path: Path, curve: str) -> None:
    lines = refusal_of(tmp_path, f"{FIRST}.{curve}=null")
    assert lines[0].endswith(
        f"{FIRST}.{curve}: missing; the first phase has no value to hold, so give one"
    )


@pytest.mark.parametrize(
    ("curve", "ramp"),
    [
        ("mixture", "{to: {prose: 1}}"),
        ("global_batch_tokens", "{to: 4096, increment: 1024}"),
        ("learning_rate", "[{to: 1e-4}]"),
        ("weight_decay", "{to: 0.2}"),
    ],
)
def test_first_ramp_of_all_needs_from(tmp_path: Path, curve: str, ramp: str) -> None:
    line = only_refusal(tmp_path, f"{FIRST}.{curve}={ramp}")
    assert line.endswith(
        "a ramp without 'from'; the first phase has no value to start at, so add 'from'"
    )


@pytest.mark.parametrize(
    ("mixture", "place"),
    [
        ("{proze: 1}", "mixture.proze"),
        ("{from: {proze: 1}, to: {prose: 1}}", "mixture.from.proze"),
        ("[{to: {prose: 1}, over: 1k}, {to: {proze: 1}}]", "mixture.1.to.proze"),
    ],
)
def test_mixture_names_sources_that_exist(tmp_path: Path, mixture: str, place: str) -> None:
    line = only_refusal(tmp_path, f"{SECOND}.mixture={mixture}")
    assert line == (f"{SECOND}.{place}: no such source in data.sources; did you mean 'prose'?")


@pytest.mark.parametrize("curve", ["learning_rate", "weight_decay"])
def test_rates_are_not_negative(tmp_path: Path, curve: str) -> None:
    assert only_refusal(tmp_path, f"{SECOND}.{curve}=-0.1") == (
        f"{SECOND}.{curve}: found -0.1; must be 0 or more"
    )
    assert only_refusal(tmp_path, f"{SECOND}.{curve}={{to: -0.1}}") == (
        f"{SECOND}.{curve}.to: found -0.1; must be 0 or more"
    )


def test_pieces_fit_into_the_phase(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, f"{FIRST}.learning_rate.over=500k")
    assert line == (
        f"recipe.yaml:15: {FIRST}.learning_rate: its pieces go over 500_000 tokens but the phase "
        "has 400_000; shorten them by 100_000, or set the phase's tokens to 500_000"
    )


def test_only_the_last_piece_may_take_the_rest(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, f"{SECOND}.learning_rate=[{{to: 1}}, {{to: 0}}]")
    assert line.startswith(f"{SECOND}.learning_rate.0: missing 'over'; only the last piece")


def test_last_piece_has_something_left(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, f"{SECOND}.learning_rate=[{{to: 1, over: 800k}}, {{to: 0}}]")
    assert "the others take all 800_000 tokens of the phase" in line


def test_sequence_fits_the_model(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, f"{SECOND}.seq_length=512")
    assert line == (
        f"{SECOND}.seq_length: found 512; use at most model.max_position_embeddings, 256, "
        "or set that to 512"
    )


def test_sequence_lengths_share_a_chunk(tmp_path: Path) -> None:
    overrides = (f"{SECOND}.seq_length=192", "parallel.micro_batch_tokens=384")
    overrides += (f"{FIRST}.global_batch_tokens=3840", f"{SECOND}.global_batch_tokens=3840")
    line = only_refusal(tmp_path, *overrides)
    assert f"{FIRST}.seq_length: found 128; it does not divide the longest seq_length" in line
    assert line.endswith("set data.chunk_tokens to 384 or 768")
    assert sound_recipe(tmp_path, *overrides, "data.chunk_tokens=384").data.chunk_tokens == 384


def test_micro_batch_is_a_multiple_of_every_sequence_length(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "parallel.micro_batch_tokens=128")
    assert line == (
        "parallel.micro_batch_tokens: found 128; must be a multiple of every seq_length, "
        "and is not of 256; use 256"
    )


@pytest.mark.parametrize(
    ("override", "place", "complaint"),
    [
        (
            f"{SECOND}.global_batch_tokens=8300",
            f"{SECOND}.global_batch_tokens",
            "found 8_300; must be a multiple of seq_length 256, such as 8_192 or 9_216",
        ),
        (
            f"{SECOND}.global_batch_tokens.to=8448",
            f"{SECOND}.global_batch_tokens.to",
            "found 8_448; must be a multiple of parallel.micro_batch_tokens 1_024, "
            "such as 8_192 or 9_216",
        ),
        (
            f"{SECOND}.global_batch_tokens.increment=100",
            f"{SECOND}.global_batch_tokens.increment",
            "found 100; must be a multiple of seq_length 256, such as 1_024",
        ),
        (
            f"{SECOND}.global_batch_tokens.from=100",
            f"{SECOND}.global_batch_tokens.from",
            "found 100; must be a multiple of seq_length 256, such as 1_024",
        ),
    ],
)
def test_batches_are_whole_micro_batches(
    tmp_path: Path, override: str, place: str, complaint: str
) -> None:
    assert only_refusal(tmp_path, override) == f"{place}: {complaint}"


def test_inherited_batch_is_checked_against_the_new_sequence_length(tmp_path: Path) -> None:
    overrides = (f"{FIRST}.global_batch_tokens=4224", "parallel.micro_batch_tokens=128")
    refusal = (
        "a batch of 4_224 tokens is inherited; must be a multiple of seq_length 256, "
        "such as 4_096 or 4_352"
    )
    held = refusal_of(tmp_path, *overrides, f"{SECOND}.global_batch_tokens=null")
    assert held[-1].endswith(f"{SECOND}: {refusal}")
    ramp_start = refusal_of(tmp_path, *overrides)
    assert ramp_start[-1].endswith(f"{SECOND}.global_batch_tokens: {refusal}")


def test_heads_divide_by_tensor_parallel_size(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "parallel.tensor_model_parallel_size=4")
    assert line == (
        "parallel.tensor_model_parallel_size: found 4; does not divide model.num_attention_heads 6 "
        "or model.num_query_groups 2; use 1 or 2"
    )


def test_query_groups_divide_the_heads(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "model.num_query_groups=4")
    assert line == (
        "model.num_query_groups: found 4; must divide num_attention_heads 6: use 1, 2, 3 or 6"
    )


def test_sequence_parallel_needs_tensor_parallel(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "parallel.sequence_parallel=true")
    assert line.startswith("parallel.sequence_parallel: true needs tensor_model_parallel_size")


def test_layers_divide_by_pipeline_size(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "parallel.pipeline_model_parallel_size=3")
    assert line.endswith("found 3; does not divide model.num_layers 4; use 1, 2 or 4")


def test_layers_divide_by_pipeline_and_virtual_stages(tmp_path: Path) -> None:
    line = only_refusal(
        tmp_path,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=3",
    )
    assert line.endswith("a stage has 2 of the 4 layers, which it must divide: use 1 or 2")


def test_virtual_stages_need_a_pipeline(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "parallel.virtual_pipeline_model_parallel_size=2")
    assert "needs pipeline_model_parallel_size above 1" in line


def test_sequence_divides_by_twice_the_context_size(tmp_path: Path) -> None:
    lines = refusal_of(tmp_path, "parallel.context_parallel_size=3")
    assert lines[0].endswith(
        "found 128; must be a multiple of 2 x context_parallel_size 3, such as 126 or 132"
    )
    assert len(lines) == 2


def test_sequence_divides_by_context_and_tensor_size_under_sequence_parallel(
    tmp_path: Path,
) -> None:
    text = SOUND.replace(
        "preset: demo", "preset: demo, num_attention_heads: 9, num_query_groups: 3"
    )
    text = text.replace("preset: demo", "preset: demo, ffn_hidden_size: 513")
    lines = refusal_of(
        tmp_path,
        "parallel.tensor_model_parallel_size=3",
        "parallel.sequence_parallel=true",
        "parallel.context_parallel_size=2",
        text=text,
    )
    assert len(lines) == 2
    assert "must be a multiple of 2 x context_parallel_size 2 and of context x tensor" in lines[0]
    assert lines[0].endswith("such as 132 or 120")


def test_evaluation_reads_at_least_one_sequence(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "evaluation.tokens_per_source=255")
    assert line.endswith("found 255; holds no sequence of 256 tokens; use 256 or more")


@pytest.mark.parametrize("world_size", [1, 3, 0])
def test_world_size_that_does_not_hold_the_layout_is_refused(
    tmp_path: Path, world_size: int
) -> None:
    recipe = sound_recipe(tmp_path, "parallel.tensor_model_parallel_size=2")
    with pytest.raises(RecipeError) as caught:
        check_layout(recipe, world_size)
    assert f"{world_size} ranks cannot hold tensor 2 x pipeline 1 x context 1 = 2 ranks" in str(
        caught.value
    )
    remedy = {1: "start 2 ranks", 3: "start 2 or 4 ranks", 0: "start 2 ranks"}[world_size]
    assert remedy in str(caught.value)


def test_layout_that_fits_is_accepted(tmp_path: Path) -> None:
    check_layout(sound_recipe(tmp_path, "parallel.tensor_model_parallel_size=2"), 2)
    check_layout(sound_recipe(tmp_path), 1)


def test_batches_divide_by_micro_batch_and_data_parallel_ranks(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_layout(sound_recipe(tmp_path), 4)
    assert str(caught.value).splitlines()[0] == (
        f"{SECOND}.global_batch_tokens.increment: found 1_024; must be a multiple of 4_096 "
        "(1_024 tokens a micro-batch x 4 data-parallel ranks), such as 4_096"
    )


def test_interleaved_pipeline_takes_micro_batches_in_whole_rounds(tmp_path: Path) -> None:
    recipe = sound_recipe(
        tmp_path,
        "parallel.pipeline_model_parallel_size=2",
        "parallel.virtual_pipeline_model_parallel_size=2",
    )
    with pytest.raises(RecipeError, match=r"increment: found 1_024; must be a multiple of 2_048"):
        check_layout(recipe, 2)
