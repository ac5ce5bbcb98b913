import re
from pathlib import Path

import pytest

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.recipe.phases import MixturePiece, Piece, normalised
from megatron_curr.recipe.schema import Checkpoint, Evaluation
from megatron_curr.recipe.shipped import shipped_recipe
from tests.recipe.recipes import SOUND, only_refusal, refusal_of, sound_recipe, write_recipe


def test_sound_recipe_loads_with_sizes_presets_and_normalised_weights(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path)
    short, mixed = recipe.curriculum.phases
    assert (short.tokens, mixed.tokens) == (400_000, 800_000)
    assert short.mixture == {"prose": 0.75, "code": 0.25}
    assert isinstance(mixed.mixture, MixturePiece)
    assert mixed.mixture.to == {"prose": 0.5, "code": 0.5}
    assert isinstance(short.learning_rate, Piece)
    assert short.learning_rate.to == 3e-4  # YAML 1.1 would have read text
    assert recipe.model.hidden_size == 192
    assert recipe.folder == Path("runs/small")


def test_weight_decay_of_the_first_phase_has_a_default(tmp_path: Path) -> None:
    short, mixed = sound_recipe(tmp_path).curriculum.phases
    assert (short.weight_decay, mixed.weight_decay) == (0.1, None)


def test_dump_loads_to_an_equal_recipe(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, "run_folder=somewhere/else", "data.sources.on={shards: '1e3'}")
    assert load_recipe(write_recipe(tmp_path, dump_recipe(recipe))) == recipe


def test_weights_that_do_not_sum_exactly_survive_a_second_normalisation() -> None:
    weights = {f"source_{i}": 0.1 + i / 7 for i in range(50)}
    assert normalised(normalised(weights)) == normalised(weights)


def test_unknown_key_names_line_and_nearest_key(tmp_path: Path) -> None:
    text = SOUND.replace("      tokens: 800k", "      token: 800k")
    assert refusal_of(tmp_path, text=text) == [
        "recipe.yaml:16: curriculum.phases.1.tokens: missing; give it: Length of the phase",
        "recipe.yaml:17: curriculum.phases.1.token: unknown key; did you mean 'tokens'?",
    ]


def test_unknown_key_with_no_neighbour_lists_what_is_known(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "optimizer.zzz=1")
    assert line == (
        "optimizer.zzz: unknown key; known keys: adam_beta1, adam_beta2, adam_eps, clip_grad"
    )


def test_unknown_key_inside_a_ramp_is_reported_for_that_form_alone(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "curriculum.phases.0.learning_rate.ovre=5k")
    assert line == "curriculum.phases.0.learning_rate.ovre: unknown key; did you mean 'over'?"


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    text = SOUND.replace("seq_length: 128", "seq_length: -1").replace("400k", "4OOk")
    lines = refusal_of(tmp_path, text=text)
    assert lines[0].startswith("recipe.yaml:11: curriculum.phases.0.tokens: '4OOk' is not a count")
    assert lines[1] == (
        "recipe.yaml:12: curriculum.phases.0.seq_length: found -1; must be greater than 0"
    )


def test_missing_section_says_so(tmp_path: Path) -> None:
    text = SOUND.replace("parallel: {micro_batch_tokens: 1024}\n", "")
    assert only_refusal(tmp_path, text=text) == (
        "recipe.yaml:1: parallel: missing; give it: How the model is split over ranks"
    )


def test_saves_and_evaluations_left_out_come_twenty_times_in_a_run(tmp_path: Path) -> None:
    text = SOUND.replace("checkpoint: {every_tokens: 100k}\n", "")
    recipe = load_recipe(write_recipe(tmp_path, text.replace("every_tokens: 100k", "")))
    assert recipe.checkpoint == Checkpoint(every_tokens=60_000)
    assert recipe.evaluation == Evaluation(every_tokens=60_000)
    assert load_recipe(write_recipe(tmp_path, dump_recipe(recipe))) == recipe


def test_a_long_run_saves_at_least_every_five_billion_tokens(tmp_path: Path) -> None:
    text = SOUND.replace("checkpoint: {every_tokens: 100k}", "checkpoint: {keep_last: 5}")
    recipe = load_recipe(write_recipe(tmp_path, text.replace("800k", "2_048_000_000_000")))
    assert recipe.checkpoint == Checkpoint(every_tokens=5 * 10**9, keep_last=5)
    assert recipe.evaluation.every_tokens == 100_000  # as it is written


def test_sequence_lengths_count_k_as_models_are_named(tmp_path: Path) -> None:
    model = "{preset: demo, max_position_embeddings: 4K}"
    text = SOUND.replace("{preset: demo}", model).replace("seq_length: 256", "seq_length: 1k")
    text = text.replace("global_batch_tokens: 4096", "global_batch_tokens: 4_096")
    recipe = load_recipe(write_recipe(tmp_path, text))
    assert recipe.model.max_position_embeddings == 4096
    assert [phase.seq_length for phase in recipe.curriculum.phases] == [128, 1024]
    assert recipe.curriculum.phases[0].tokens == 400_000


def test_missing_key_is_explained(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "parallel={}")
    assert line.startswith("parallel.micro_batch_tokens: missing; give it: Tokens per micro-batch")


def test_phase_of_zero_tokens_is_refused(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "curriculum.phases.0.tokens=0")
    assert line == "curriculum.phases.0.tokens: found 0; must be greater than 0"


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ("{prose: -1}", "weight of 'prose' is -1.0; it must be a number of 0 or more"),
        ("{prose: .nan}", "weight of 'prose' is nan; it must be a number of 0 or more"),
        ("{prose: .inf}", "weight of 'prose' is inf; it must be a number of 0 or more"),
        ("{prose: 0, code: 0}", "every weight is zero; give at least one a positive weight"),
    ],
)
@pytest.mark.parametrize("where", ["mixture", "mixture.to"])
def test_impossible_weights_are_refused(
    tmp_path: Path, where: str, weights: str, complaint: str
) -> None:
    line = only_refusal(tmp_path, f"curriculum.phases.1.{where}={weights}")
    assert line == f"curriculum.phases.1.{where}: {complaint}"


def test_weight_that_is_no_number_is_refused(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "curriculum.phases.0.mixture.prose=lots")
    assert line == "curriculum.phases.0.mixture.prose: found 'lots'; must be a number"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("seed=true", "seed: found True; must be a whole number"),
        ("seed=1.5", "seed: found 1.5; must be a whole number"),
        ("name=5", "name: found 5; must be text (put it in quotes)"),
        ("name=a b", "name: found 'a b'; use letters, digits, '_', '.' and '-' only"),
        ("optimizer.clip_grad=.nan", "optimizer.clip_grad: found nan; must be a finite number"),
        ("optimizer.adam_beta1=1", "optimizer.adam_beta1: found 1; must be less than 1.0"),
        ("training.precision=fp8", "training.precision: found 'fp8'; must be 'fp32' or 'bf16'"),
        ("evaluation=", "evaluation: found None; must be a section of keys"),
        ("data.isolate_documents=on", "data.isolate_documents: found 'on'; must be true or false"),
        ("data.sources={}", "data.sources: found {}; must have at least 1 of them"),
        ("curriculum.phases=[]", "curriculum.phases: found []; must have at least 1 of them"),
    ],
)
def test_value_of_the_wrong_kind_says_what_is_wanted(
    tmp_path: Path, override: str, complaint: str
) -> None:
    assert only_refusal(tmp_path, override) == complaint


def test_source_name_that_no_metric_could_carry_is_refused(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "data.sources.a/b={shards: x}")
    assert line.startswith("data.sources.a/b: 'a/b' is no name; use letters")


def test_unknown_preset_names_the_nearest(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "model.preset=lama3_8b")
    assert line == "model.preset: no model preset 'lama3_8b'; did you mean 'llama3_8b'?"


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, text="name: a\nmodel: {preset: demo\n")
    assert line.startswith("recipe.yaml:3: not valid YAML: ")


def test_duplicate_key_names_both_lines(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, text=SOUND + "name: other\n")
    assert line == ("recipe.yaml:24: key 'name' was given on line 1 already; keep one of the two")


def test_anchors_and_merged_keys_work(tmp_path: Path) -> None:
    text = SOUND.replace("{shards: data/prose}", "&base {shards: data/prose, max_epochs: 2}")
    text = text.replace("{shards: data/code}", "{<<: *base, shards: data/code}")
    sources = load_recipe(write_recipe(tmp_path, text)).data.sources
    assert (sources["code"].shards, sources["code"].max_epochs) == ("data/code", 2)


def test_anchor_that_contains_itself_is_refused(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, text="name: &a [*a]\n")
    assert line == "recipe.yaml:1: an anchor contains itself; write the value out"


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert "a recipe is a mapping of sections" in only_refusal(tmp_path, text=text)


def test_missing_file_names_the_nearest_recipe(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    with pytest.raises(RecipeError, match=r"no such file; did you mean 'recipe\.yaml'\?"):
        load_recipe(tmp_path / "recpie.yaml")


def test_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"a folder without recipe.yaml"):
        load_recipe(tmp_path)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="save it as UTF-8"):
        load_recipe(tmp_path / "recipe.yaml")


def test_override_reaches_into_lists_by_index_and_by_name(tmp_path: Path) -> None:
    recipe = sound_recipe(
        tmp_path, "curriculum.phases.1.tokens=2M", "curriculum.phases.short.tokens=1M"
    )
    assert [phase.tokens for phase in recipe.curriculum.phases] == [1_000_000, 2_000_000]


def test_override_makes_sections_that_the_file_leaves_out(tmp_path: Path) -> None:
    assert sound_recipe(tmp_path, "training.precision=fp32").training.precision == "fp32"


def test_last_override_of_a_key_wins(tmp_path: Path) -> None:
    assert sound_recipe(tmp_path, "seed=1", "seed=2").seed == 2


def test_unknown_override_gets_the_same_answer_as_an_unknown_key(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "modle.num_layers=4")
    assert line == "modle: unknown key; did you mean 'model'?"


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("curriculum.phases.7.tokens=1", "curriculum.phases has no item '7'; use 0 to 1 or short"),
        ("name.first=x", "name is 'small' and has no 'first'; override it whole"),
        ("seed", "not an override; write section.key=value"),
        ("model..preset=x", "not an override; write section.key=value"),
        ("seed=[", "'[' is not valid YAML; put it in quotes"),
    ],
)
def test_override_that_cannot_be_placed_is_refused(
    tmp_path: Path, override: str, complaint: str
) -> None:
    assert complaint in only_refusal(tmp_path, override)


def test_shipped_recipe_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="no_such: no such recipe here"):
        shipped_recipe("no_such")


def test_every_shipped_recipe_loads() -> None:
    for file in Path(__file__).parents[2].glob("configs/*.yaml"):
        load_recipe(shipped_recipe(file.name))


def test_second_document_in_a_file_is_told_as_such(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, text=SOUND + "---\nname: other\n")
    assert "found a second document after '---'; keep one of the two" in line


def test_tab_is_told_as_such(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, text=SOUND.replace("  tokenizer", "\ttokenizer"))
    assert line == "recipe.yaml:4: not valid YAML: found a tab; indent with spaces"


def test_init_from_without_its_kind_is_explained(tmp_path: Path) -> None:
    line = only_refusal(tmp_path, "init_from=hf_out")
    assert line.startswith("init_from: found 'hf_out'; give it: First weights: hf:FOLDER")


def test_curriculum_of_the_readme_is_sound(tmp_path: Path) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (curriculum,) = re.findall(r"```yaml\n(curriculum:.*?)```", readme, re.DOTALL)
    text = SOUND[: SOUND.index("curriculum:")] + curriculum
    text += "parallel: {micro_batch_tokens: 32_768}\nevaluation: {tokens_per_source: 64k}\n"
    sources = "{web: {shards: w}, code: {shards: c}, math: {shards: m}}"
    overrides = ["model.max_position_embeddings=32k", f"data.sources={sources}"]
    recipe = load_recipe(write_recipe(tmp_path, text), overrides)
    assert [phase.seq_length for phase in recipe.curriculum.phases] == [4096, 32_768]
