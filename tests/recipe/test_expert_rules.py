from pathlib import Path

import pytest

from megatron_curr.errors import RecipeError
from megatron_curr.recipe.check import check_layout
from tests.recipe.recipes import only_refusal, sound_recipe

EXPERTS = "model.num_moe_experts=6"
EXPERT_RANKS = "parallel.expert_model_parallel_size"
TENSOR = ("parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true")


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["model.moe_router_topk=7"], "the model has 6 experts: use 6 or fewer"),
        (["model.moe_router_topk=1"], "trains no router; set moe_router_pre_softmax: true"),
        (
            ["model.moe_router_enable_expert_bias=true"],
            "true needs moe_router_score_function: sigmoid; set it",
        ),
        (["model.moe_layer_freq=[1, 0]"], "lists 2 layers of 4; give a 1 or 0 for each"),
        (["model.moe_layer_freq=[0, 0, 0, 0]"], "gives no layer experts; set a 1"),
        ([f"{EXPERT_RANKS}=4"], "does not divide model.num_moe_experts 6; use 1, 2, 3 or 6"),
        (
            [*TENSOR, "model.moe_ffn_hidden_size=25"],
            "found 2; does not divide model.moe_ffn_hidden_size 25; use 1",
        ),
        (
            [*TENSOR, "model.moe_shared_expert_intermediate_size=25"],
            "found 2; does not divide model.moe_shared_expert_intermediate_size 25; use 1",
        ),
        (
            [TENSOR[0]],
            "a model with experts needs true: otherwise every tensor rank would send the same",
        ),
    ],
)
def test_settings_of_experts_that_do_not_agree_are_refused(
    tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    assert complaint in only_refusal(tmp_path, EXPERTS, *overrides)


@pytest.mark.parametrize(
    "override",
    [f"{EXPERT_RANKS}=2", "model.moe_aux_loss_coeff=0.1", "model.moe_ffn_hidden_size=64"],
)
def test_settings_of_experts_need_experts(tmp_path: Path, override: str) -> None:
    assert "num_moe_experts" in only_refusal(tmp_path, override)


def test_ranks_hold_whole_sets_of_experts(tmp_path: Path) -> None:
    recipe = sound_recipe(tmp_path, EXPERTS, f"{EXPERT_RANKS}=3", "parallel.micro_batch_tokens=512")
    with pytest.raises(RecipeError) as caught:
        check_layout(recipe, 2)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        f"{EXPERT_RANKS}: 2 ranks cannot hold expert 3 x expert tensor 1 x pipeline 1 = 3 ranks; "
        "start 3 ranks, or change the layout"
    )
    assert lines[2] == f"  --set {EXPERT_RANKS}=2"


def test_experts_cut_over_fewer_ranks_than_the_rest_are_accepted(tmp_path: Path) -> None:
    whole = "parallel.expert_tensor_parallel_size=1"
    recipe = sound_recipe(tmp_path, EXPERTS, *TENSOR, f"{EXPERT_RANKS}=2", whole)
    check_layout(recipe, 2)
    assert recipe.parallel.expert_tp_size == 1
    assert sound_recipe(tmp_path, EXPERTS, *TENSOR).parallel.expert_tp_size == 2


def test_layers_with_experts_are_listed_or_counted(tmp_path: Path) -> None:
    def layers(*overrides: str) -> tuple[bool, ...]:
        return sound_recipe(tmp_path, *overrides).model.moe_layers

    assert layers() == (False,) * 4
    assert layers(EXPERTS) == (True,) * 4
    assert layers(EXPERTS, "model.moe_layer_freq=3") == (True, False, False, True)
    assert layers(EXPERTS, "model.moe_layer_freq=[0, 0, 1, 0]") == (False, False, True, False)
