"""A checkpoint of one layout is the same run on any other: to the bit at rest, then to rounding."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_curr.recipe.layout_name import parse_layout
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.checkpoint_folder import list_checkpoints
from tests.ranks import RankError, run_ranks
from tests.training.runs import Runs, losses, rows

MODEL = {
    "model.num_attention_heads": 8,
    "model.num_query_groups": 4,
    "model.hidden_size": 64,
    "model.qk_layernorm": True,
    "parallel.micro_batch_tokens": 64,
}
TIED = {**MODEL, "model.untie_embeddings_and_output_weights": False}
EXPERTS = {**MODEL, "model.num_moe_experts": 4, "model.moe_ffn_hidden_size": 32}
# Each checkpoint is loaded and saved again by the next layout, and at the end by one rank.
RINGS: dict[str, tuple[dict[str, Any], list[tuple[int, list[str]]]]] = {
    "tied": (
        TIED,
        [
            (2, ["tp2sp", "pp2vpp2", "dp2do", "cp2"]),
            (4, ["tp2pp2spdo", "cp2dp2do", "pp4", "tp2cp2", "pp2vpp2dp2do"]),
            (1, ["1"]),
        ],
    ),
    "experts": (
        EXPERTS,
        [(2, ["ep2do", "pp2", "tp2ep2etp1sp"]), (4, ["tp2ep2spdo", "pp2ep2"]), (1, ["1"])],
    ),
}
# Two or three steps on each, then on to the next.
JOURNEY = [("tp2sp", 2), ("pp2vpp2", 2), ("dp2do", 2), ("tp2pp2spdo", 4), ("cp2", 2), ("1", 1)]
FIRST_STOP_TOKENS, LEG_TOKENS = 768, 768


def layout_changes(recipe: Path, layout: str) -> dict[str, Any]:
    parallel = parse_layout(layout, load_recipe(recipe)).parallel
    return {f"parallel.{field}": value for field, value in parallel.model_dump().items()}


def pass_on(
    rank: int, recipe: Path, layouts: Sequence[str], checkpoints: Path, folder: Path
) -> None:
    """Load the newest checkpoint and save it on each layout, in ``folder``/<layout>."""
    from megatron_curr.parallel.groups import build_groups, destroy_groups
    from megatron_curr.training.build import build_model
    from megatron_curr.training.checkpoint import Checkpointer
    from megatron_curr.training.preflight import prepare

    loaded = load_recipe(recipe)
    for layout in layouts:
        moved = parse_layout(layout, loaded).recipe(loaded)
        groups = build_groups(moved.parallel)
        prepared = prepare(moved, dist.get_world_size())
        chunks, optimizer = build_model(moved, groups=groups, vocab_size=prepared.vocab_size)

        def checkpointer(place: Path) -> Checkpointer:
            return Checkpointer(
                place,
                chunks=[chunk.module for chunk in chunks],  # noqa: B023
                optimizer=optimizer,  # noqa: B023
                pg_collection=groups.pg_collection,  # noqa: B023
                settings=moved.checkpoint,  # noqa: B023
            )

        state, passed_over = checkpointer(checkpoints).load_newest()
        assert state is not None and not passed_over
        checkpoints = folder / layout
        report = checkpointer(checkpoints).save(state)
        assert report.error is None, report.error
        destroy_groups()


def assert_same_tensors(rank: int, saved: Path, others: Sequence[Path]) -> None:
    from megatron.core.dist_checkpointing import load_plain_tensors

    expected = load_plain_tensors(str(newest(saved)))
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in expected)
    for other in others:
        found = load_plain_tensors(str(newest(other)))
        assert found.keys() == expected.keys(), other.name
        wrong = [
            name
            for name, value in expected.items()
            if not torch.equal(torch.as_tensor(found[name]), torch.as_tensor(value))
        ]
        assert not wrong, f"{other.name}: {wrong}"


def lists_its_share_of_moments(rank: int, recipe: Path) -> None:
    """The distributed optimizer's state is listed once over the data ranks, half by each."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_curr.parallel.groups import build_groups, destroy_groups
    from megatron_curr.training.build import build_model
    from megatron_curr.training.optimizer_state import sharded_state
    from megatron_curr.training.preflight import prepare

    loaded = load_recipe(recipe)
    moved = parse_layout("dp2do", loaded).recipe(loaded)
    groups = build_groups(moved.parallel)
    prepared = prepare(moved, dist.get_world_size())
    chunks, optimizer = build_model(moved, groups=groups, vocab_size=prepared.vocab_size)
    metadata = {"dp_cp_group": groups.pg_collection.dp_cp}
    model_state = {"model0": chunks[0].module.sharded_state_dict(metadata=metadata)}
    kept = [listed.data for listed in nested_values(sharded_state(optimizer, model_state))]
    mine = sum(tensor.numel() for tensor in kept)
    assert mine == sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept)  # no bucket held
    total = torch.tensor(mine)
    dist.all_reduce(total)
    assert int(total) == 2 * sum(param.numel() for param in chunks[0].parameters())
    assert mine < 0.6 * int(total)
    destroy_groups()


def test_data_ranks_share_out_the_moments_of_a_checkpoint(runs: Runs) -> None:
    run_ranks(lists_its_share_of_moments, 2, runs.recipe("shared_out", TIED))


def newest(checkpoints: Path) -> Path:
    return list_checkpoints(checkpoints)[-1]


def train_on_one_rank(runs: Runs, model: str) -> Path:
    """Checkpoints of a run of one rank that has moments of its own."""
    changes, _ = RINGS[model]
    return runs.train(f"trained_{model}", changes=changes, stop_at_tokens=1024) / "checkpoints"


@pytest.fixture(scope="module")
def trained(runs: Runs) -> Path:
    return train_on_one_rank(runs, "tied")


@pytest.mark.parametrize("model", RINGS)
def test_weights_and_moments_go_round_all_layouts_to_the_bit(
    runs: Runs, tmp_path: Path, model: str
) -> None:
    changes, ring = RINGS[model]
    recipe = runs.recipe(f"moving_{model}", changes)
    trained = at = train_on_one_rank(runs, model)
    stations = []
    for num_ranks, layouts in ring:
        run_ranks(pass_on, num_ranks, recipe, layouts, at, tmp_path)
        stations += [tmp_path / layout for layout in layouts]
        at = stations[-1]
    run_ranks(assert_same_tensors, 1, trained, stations)


def test_a_run_that_moves_at_every_stop_loses_what_the_one_that_stayed_loses(runs: Runs) -> None:
    end_tokens = FIRST_STOP_TOKENS + LEG_TOKENS * len(JOURNEY)
    stayed = runs.train("stayed", changes=MODEL, stop_at_tokens=end_tokens)
    moved = runs.train("moved", changes=MODEL, stop_at_tokens=FIRST_STOP_TOKENS)
    for number, (layout, num_ranks) in enumerate(JOURNEY, start=1):
        changes = {**MODEL, **layout_changes(runs.recipe("moved", MODEL), layout)}
        stop_at_tokens = FIRST_STOP_TOKENS + LEG_TOKENS * number
        runs.train("moved", ranks=num_ranks, changes=changes, stop_at_tokens=stop_at_tokens)
    assert len(losses(moved)) == len(losses(stayed)) > 2 * len(JOURNEY)
    assert losses(moved) == pytest.approx(losses(stayed), abs=1e-4)
    norms = [[row["train/grad_norm"] for row in rows(run)] for run in (moved, stayed)]
    assert norms[0] == pytest.approx(norms[1], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"model.num_layers": 2},
            "decoder.layers.self_attention.linear_qkv.layer_norm_weight is 4 x 64 in the "
            "checkpoint and is 2 x 64 in the recipe's model",
        ),
        (
            {"model.make_vocab_size_divisible_by": 512},
            "embedding.word_embeddings.weight is 384 x 64 in the checkpoint and is 512 x 64",
        ),
        (
            {"model.qk_layernorm": False},
            "decoder.layers.self_attention.k_layernorm.weight is 4 x 8 in the checkpoint and is "
            "not in the recipe's model",
        ),
        (
            {"model.untie_embeddings_and_output_weights": True},
            "output_layer.weight is not in the checkpoint and is 384 x 64 in the recipe's model",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_by_its_first_parameter(
    runs: Runs, trained: Path, change: dict[str, Any], told: str
) -> None:
    other = runs.recipe("other", {**TIED, **change})
    folder = runs.folder / "other"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(trained, folder / "checkpoints")
    shutil.copy(other, folder / "recipe.yaml")  # as if the recipe had been swapped under the run
    shutil.copy(trained.parent / "ledger.jsonl", folder / "ledger.jsonl")
    with pytest.raises(RankError, match=r"CheckpointError: .*of another model or vocabulary") as e:
        runs.train("other", ranks=2, changes={**TIED, **change})
    assert told in str(e.value)
