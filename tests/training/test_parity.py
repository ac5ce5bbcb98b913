"""Every layout trains the model that one rank trains, and the harness notices one that does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_curr.recipe.layout_name import parse_layout
from megatron_curr.recipe.load import load_recipe
from megatron_curr.training.parity_verdict import (
    FIRST_WEIGHTS,
    GRAD_NORM,
    GRADIENTS,
    LOSS,
    REPLICAS,
    WEIGHTS,
    Verdict,
)
from tests.ranks import run_ranks
from tests.training.runs import Runs

TOLERANCE = 2e-5
NUM_STEPS = 10
EIGHT_HEADS = {
    "model.num_attention_heads": 8,
    "model.num_query_groups": 4,
    "model.hidden_size": 64,
    "parallel.micro_batch_tokens": 64,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": EIGHT_HEADS,
    "isolated": {**EIGHT_HEADS, "data.isolate_documents": True},
    "tied": {
        **EIGHT_HEADS,
        "model.untie_embeddings_and_output_weights": False,
        "model.qk_layernorm": True,
        "model.add_qkv_bias": True,
    },
    "experts": {
        **EIGHT_HEADS,
        "model.num_moe_experts": 4,
        "model.moe_ffn_hidden_size": 32,
        "model.moe_aux_loss_coeff": 0.01,
    },
}
# By model and number of ranks, because layouts of as many ranks share their processes.
MATRIX: dict[tuple[str, int], list[str]] = {
    ("llama", 2): [
        "tp2", "tp2sp", "pp2", "pp2vpp2", "pp2first1", "cp2ring", "cp2gather", "cp2a2a", "dp2",
        "dp2do", "dp2doov", "tp2sp-rcfull", "cp2-rcsel",
    ],
    ("llama", 4): [
        "tp4sp", "pp4", "cp4ring", "cp4gather", "cp4a2a", "cp4hier", "tp2cp2sp", "pp2cp2", "tp2dp2",
    ],
    ("llama", 8): ["tp2pp2cp2spdo"],
    ("isolated", 2): ["cp2ring", "cp2gather", "cp2a2a", "tp2sp", "pp2vpp2"],
    ("isolated", 4): ["cp4ring", "cp4gather", "cp4hier"],
    ("tied", 4): ["tp2pp2sp", "pp2dp2do"],
    ("experts", 2): ["ep2", "tp2ep2etp1sp"],
    ("experts", 4): ["tp2ep2sp"],
}  # fmt: skip


@pytest.fixture(scope="module")
def recipes(runs: Runs) -> dict[str, Path]:
    return {name: runs.recipe(name, changes) for name, changes in MODELS.items()}


@pytest.fixture(scope="module")
def references(recipes: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the observation of one rank for every model."""
    folder = tmp_path_factory.mktemp("references")
    run_ranks(observe_one_rank, 1, recipes, folder)
    return folder


def observe_one_rank(rank: int, recipes: dict[str, Path], folder: Path) -> None:
    for name, recipe in recipes.items():
        observe_layout(recipe, "1").save(folder / f"{name}.pt")


def observe_layout(recipe: Path, layout: str, *, num_steps: int = NUM_STEPS) -> Any:
    """What the harness observes of a layout, by all of its ranks."""
    from megatron_curr.training.parity import observe
    from megatron_curr.training.preflight import prepare

    loaded = load_recipe(recipe)
    moved = parse_layout(layout, loaded).recipe(loaded)
    return observe(prepare(moved, dist.get_world_size()), num_steps)


def verdict_on(recipe: Path, layout: str, reference: Path) -> Verdict:
    from megatron_curr.training.parity import Observation, compare

    return compare(
        observe_layout(recipe, layout),
        Observation.load(reference),
        layout=layout,
        num_ranks=dist.get_world_size(),
        tolerance=TOLERANCE,
    )


def layouts_agree(rank: int, recipe: Path, layouts: Sequence[str], reference: Path) -> None:
    verdicts = [verdict_on(recipe, layout, reference) for layout in layouts]
    wrong = [verdict.sentence() for verdict in verdicts if not verdict.agrees]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(("model", "num_ranks"), MATRIX)
def test_layouts_train_what_one_rank_trains(
    recipes: dict[str, Path], references: Path, model: str, num_ranks: int
) -> None:
    layouts = MATRIX[model, num_ranks]
    run_ranks(layouts_agree, num_ranks, recipes[model], layouts, references / f"{model}.pt")


# One deliberate mistake of each class. Each changes the model or megatron-core inside the ranks.

NORM = "decoder.layers.2.pre_mlp_layernorm.weight"
EMBEDDINGS = "embedding.word_embeddings.weight"


@contextmanager
def built_with(change: Callable[[nn.Module], None]) -> Iterator[None]:
    """Change every pipeline chunk once it is built, before it is wrapped."""
    from megatron_curr.training import build

    original = build.build_gpt_chunks

    def build_changed(*args: Any, **settings: Any) -> list[nn.Module]:
        chunks = original(*args, **settings)
        for chunk in chunks:
            change(chunk)
        return chunks

    with patch.object(build, "build_gpt_chunks", build_changed):
        yield


def gradient_not_summed_over_tp() -> AbstractContextManager[None]:
    """A norm that forgets that its rank saw a part of the sequence."""

    def forget(chunk: nn.Module) -> None:
        chunk.decoder.layers[2].pre_mlp_layernorm.weight.sequence_parallel = False

    return built_with(forget)


class SumAgain(torch.autograd.Function):
    """Sums, going back, gradients that every tensor rank holds whole already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        from megatron.core import parallel_state

        grad = grad.clone()
        dist.all_reduce(grad, group=parallel_state.get_tensor_model_parallel_group())
        return grad


def gradient_multiplied_by_tp() -> AbstractContextManager[None]:
    """Embeddings whose gathered output passes its gradient back once for each rank."""

    def sum_again(chunk: nn.Module) -> None:
        embeddings = chunk.embedding.word_embeddings
        embeddings.register_forward_hook(lambda module, inputs, output: SumAgain.apply(output))

    return built_with(sum_again)


def embeddings_not_summed_over_pp() -> Any:
    """Tied embeddings of which the first and the last stage keep their own gradient."""
    # By name: the package has a function of the module's name.
    module = import_module("megatron.core.distributed.finalize_model_grads")
    return patch.object(module, "_allreduce_word_embedding_grads", lambda *args, **settings: None)


def wrong_rope_slice_under_cp() -> Any:
    """Each rank takes the angles of a contiguous run, but holds two chunks from both ends."""
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    def contiguous(angles: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        return angles.chunk(group.size(), dim=dim)[group.rank()]

    return patch.object(rotary_pos_embedding, "get_pos_emb_on_this_cp_rank", contiguous)


def wrong_mask_at_a_document_edge() -> Any:
    """A document's first token sees the document before instead of its own."""
    from megatron_curr.models.attention import CoreAttention

    original = CoreAttention.forward

    def off_by_one(
        self: Any, query: Tensor, key: Tensor, value: Tensor, ids: Tensor, *more: Any, **named: Any
    ) -> Tensor:
        shifted = torch.cat([ids[:, :1], ids[:, :-1]], dim=1)
        return original(self, query, key, value, shifted, *more, **named)

    return patch.object(CoreAttention, "forward", off_by_one)


def updated_weights_not_gathered() -> Any:
    """A distributed optimizer after which each rank keeps the weights it updated itself."""
    from megatron.core.distributed import DistributedDataParallel

    return patch.object(DistributedDataParallel, "start_param_sync", lambda *args, **settings: None)


MISTAKES: dict[Callable[[], Any], tuple[str, str]] = {
    gradient_not_summed_over_tp: ("llama", "tp2sp"),
    gradient_multiplied_by_tp: ("llama", "tp2"),
    embeddings_not_summed_over_pp: ("tied", "pp2"),
    wrong_rope_slice_under_cp: ("llama", "cp2"),
    wrong_mask_at_a_document_edge: ("isolated", "cp2"),
    updated_weights_not_gathered: ("llama", "dp2do"),
}


def observe_mistakes(rank: int, recipes: dict[str, Path], references: Path, folder: Path) -> None:
    for mistake, (model, layout) in MISTAKES.items():
        with mistake():
            verdict = verdict_on(recipes[model], layout, references / f"{model}.pt")
        if rank == 0:
            (folder / mistake.__name__).write_text(verdict.to_json())


@pytest.fixture(scope="module")
def caught(
    recipes: dict[str, Path], references: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Callable[[], Any]], Verdict]:
    """The verdict on a mistake."""
    folder = tmp_path_factory.mktemp("mistakes")
    run_ranks(observe_mistakes, 2, recipes, references, folder)
    return lambda mistake: Verdict.from_json((folder / mistake.__name__).read_text())


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_is_caught(caught: Any, mistake: Callable[[], Any]) -> None:
    verdict = caught(mistake)
    assert not verdict.agrees
    assert not verdict.of(FIRST_WEIGHTS)


@pytest.mark.parametrize(
    ("mistake", "parameter"),
    [
        (gradient_not_summed_over_tp, NORM),
        (gradient_multiplied_by_tp, EMBEDDINGS),
        (embeddings_not_summed_over_pp, EMBEDDINGS),
    ],
)
def test_a_wrong_gradient_is_named_and_no_other(
    caught: Any, mistake: Callable[[], Any], parameter: str
) -> None:
    (wrong,) = caught(mistake).of(GRADIENTS)
    assert wrong.parameter == parameter
    assert caught(mistake).differing[0] == wrong
    assert parameter in caught(mistake).sentence()


def test_a_factor_is_told_to_its_size(caught: Any) -> None:
    (wrong,) = caught(gradient_multiplied_by_tp).of(GRADIENTS)
    assert wrong.relative == pytest.approx(1.0, abs=1e-4)  # twice as large as it should be


def test_a_missing_sum_leaves_unequal_replicas(caught: Any) -> None:
    replicas = {m: [d.parameter for d in caught(m).of(REPLICAS)] for m in MISTAKES}
    assert NORM in replicas[gradient_not_summed_over_tp]
    assert EMBEDDINGS in replicas[embeddings_not_summed_over_pp]


@pytest.mark.parametrize("mistake", [wrong_rope_slice_under_cp, wrong_mask_at_a_document_edge])
def test_wrong_attention_shows_in_the_loss(caught: Any, mistake: Callable[[], Any]) -> None:
    verdict = caught(mistake)
    assert verdict.of(LOSS)
    assert "layers.0.self_attention.linear_qkv.weight" in str(verdict.of(GRADIENTS))


def test_an_update_that_is_not_gathered_shows_in_weights_and_replicas(caught: Any) -> None:
    verdict = caught(updated_weights_not_gathered)
    assert not verdict.of(GRADIENTS)
    assert verdict.differing[0].quantity == WEIGHTS
    assert verdict.of(REPLICAS)


def observation(**changes: Any) -> Any:
    from megatron_curr.training.parity import Observation

    tensors = {"large": torch.ones(4), "small": torch.full((4,), 1e-6)}
    values = dict(
        losses=[2.0, 1.0],
        grad_norms=[1.0, 1.0],
        first_weights=tensors,
        gradients=tensors,
        weights=tensors,
        unequal_replicas=[],
    )
    return Observation(**{**values, **changes})


def judge(**changes: Any) -> Verdict:
    from megatron_curr.training.parity import compare

    return compare(
        observation(**changes), observation(), layout="tp2", num_ranks=2, tolerance=TOLERANCE
    )


def test_equal_observations_agree() -> None:
    assert judge().agrees
    assert {largest.relative for largest in judge().largest.values()} == {0.0}


def test_noise_in_a_tensor_that_cancels_is_measured_by_the_largest() -> None:
    noise = {"large": torch.ones(4), "small": torch.full((4,), 1e-6) + 1e-8}
    assert judge(gradients=noise).largest[GRADIENTS].relative == pytest.approx(1e-5, rel=1e-2)
    wrong = {"large": torch.ones(4), "small": torch.full((4,), 2e-6)}
    assert judge(gradients=wrong).of(GRADIENTS)[0].parameter == "small"


def test_first_weights_must_be_equal_to_the_bit() -> None:
    moved = {"large": torch.ones(4), "small": torch.full((4,), 1.0000001e-6)}
    assert judge(first_weights=moved).of(FIRST_WEIGHTS)[0].parameter == "small"
    assert judge(weights=moved).agrees


def test_a_parameter_of_another_shape_or_none_is_infinitely_wrong() -> None:
    for gradients in ({"large": torch.ones(4)}, {"large": torch.ones(4), "small": torch.ones(5)}):
        verdict = judge(gradients=gradients)
        assert "gradients of small: missing, or of another shape" in verdict.sentence()
        assert Verdict.from_json(verdict.to_json()) == verdict


def test_not_a_number_is_a_difference() -> None:
    nan = float("nan")
    assert judge(losses=[2.0, nan]).of(LOSS)
    assert judge(grad_norms=[nan, 1.0]).of(GRAD_NORM)
    assert judge(weights={"large": torch.full((4,), nan), "small": torch.zeros(4)}).of(WEIGHTS)


def test_the_sentence_names_the_first_parameter_and_counts_the_rest() -> None:
    verdict = judge(
        gradients={"large": torch.full((4,), 3.0), "small": torch.ones(4)}, losses=[2.0, 1.5]
    )
    assert verdict.sentence() == (
        "tp2 differs: gradients of large by 2.0e+00; also gradients of 1 more, loss by 5.0e-01"
    )
    assert replace(verdict, differing=()).agrees
