"""Settings of an architecture that no model combines are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.recipe.recipes import only_refusal, sound_recipe

LATENT = ("model.kv_lora_rank=16", "model.num_query_groups=6")
EXPERTS = ("model.num_moe_experts=8",)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ["model.norm_position=after", "model.normalization=LayerNorm"],
            "model.normalization: found LayerNorm; no model with norm_position after has it",
        ),
        (
            ["model.norm_position=after", "model.parallel_residual=true"],
            "model.parallel_residual: found true; no model with norm_position after",
        ),
        (
            [*EXPERTS, "model.activation=gelu"],
            "model.activation: found gelu; no model with num_moe_experts has it: set swiglu",
        ),
        (["model.qk_layernorm_over=projection"], "is for models with qk_layernorm: true"),
        (["model.rotary_percent=0.1"], "rotates 3.2 of 32 dims of a head"),
        (["model.q_lora_rank=8"], "is for multi-latent attention; set kv_lora_rank"),
        ([LATENT[0]], "model.num_query_groups: found 2; no model with kv_lora_rank has it: set 6"),
        (
            [*LATENT, "parallel.tensor_model_parallel_size=2"],
            "multi-latent attention over tensor ranks needs true",
        ),
        ([*EXPERTS, "model.moe_router_num_groups=4"], "model.moe_router_group_topk: is missing"),
        (
            [*EXPERTS, "model.moe_router_num_groups=3", "model.moe_router_group_topk=1"],
            "found 3; must divide num_moe_experts 8",
        ),
        (
            [*EXPERTS, "model.moe_router_num_groups=4", "model.moe_router_group_topk=4"],
            "found 4; must divide moe_router_topk 2",
        ),
        (["model.moe_router_topk_scaling_factor=2.0"], "is for models with experts"),
    ],
)
def test_settings_that_no_model_combines_are_refused(
    tmp_path: Path, overrides: list[str], complaint: str
) -> None:
    assert complaint in only_refusal(tmp_path, *overrides)


def test_what_published_models_combine_is_sound(tmp_path: Path) -> None:
    for overrides in (
        ("model.normalization=LayerNorm", "model.activation=gelu", "model.linear_biases=all"),
        ("model.norm_position=after", "model.qk_layernorm=true"),
        (*LATENT, *EXPERTS, "model.moe_router_num_groups=4", "model.moe_router_group_topk=1"),
    ):
        sound_recipe(tmp_path, *overrides)
