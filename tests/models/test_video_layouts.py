"""Every layout trains the video transformer that one rank trains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import tensor_parallel

from megatron_curr.models import dit_layer
from megatron_curr.models.video_dit import VideoDiT
from megatron_curr.recipe.parallel import Parallel
from tests.models.video_steps import run_video_steps
from tests.models.videos import tiny_dit
from tests.parallel.layouts import layout
from tests.parallel.test_layouts import differences
from tests.ranks import run_ranks

TWO_RANKS = {
    "tp2": layout(tp=2),
    "tp2 sp": layout(tp=2, sequence_parallel=True),
    "pp2": layout(pp=2),
    "cp2 ring": layout(cp=2),
    "cp2 gather": layout(cp=2, context_parallel_exchange="all_gather"),
    "cp2 heads": layout(cp=2, context_parallel_exchange="a2a"),
    "dp2 distributed optimizer": layout(distributed_optimizer=True),
    "tp2 sp, recompute full": layout(tp=2, sequence_parallel=True, recompute="full"),
    "tp2, recompute one layer of two": layout(
        tp=2, recompute="full", recompute_method="block", recompute_num_layers=1
    ),
    "cp2, recompute selective": layout(
        cp=2, recompute="selective", recompute_modules=["core_attn", "mlp"]
    ),
}
FOUR_RANKS = {
    "tp2 cp2 sp": layout(tp=2, cp=2, sequence_parallel=True),
    "pp2 cp2": layout(pp=2, cp=2),
    "pp2 dp2 distributed optimizer": layout(pp=2, distributed_optimizer=True),
    "pp2 tp2 sp, recompute full": layout(pp=2, tp=2, sequence_parallel=True, recompute="full"),
}
# One layer a stage: the distributed optimizer's cut runs through the modules of the conditioning.
MODEL = tiny_dit(num_layers=2)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "one_rank.pt"
    run_ranks(save_one_rank, 1, path)
    return path


def save_one_rank(rank: int, path: Path) -> None:
    torch.save(run_video_steps(layout(), model=MODEL, num_steps=2), path)


def layouts_equal_one_rank(rank: int, path: Path, layouts: dict) -> None:
    one_rank = torch.load(path, weights_only=False)
    wrong = {}
    for name, parallel in layouts.items():
        ours = run_video_steps(parallel, model=MODEL, num_steps=2)
        if found := differences(ours, one_rank):
            wrong[name] = found
    assert not wrong, wrong


def test_two_ranks_equal_one(one_rank: Path) -> None:
    run_ranks(layouts_equal_one_rank, 2, one_rank, TWO_RANKS)


def test_four_ranks_equal_one(one_rank: Path) -> None:
    run_ranks(layouts_equal_one_rank, 4, one_rank, FOUR_RANKS)


def gradients_of_copies_added(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    """The prediction is the same on every tensor rank, and so is the loss."""
    right = tensor_parallel.gather_from_sequence_parallel_region
    patch.setattr(
        tensor_parallel,
        "gather_from_sequence_parallel_region",
        lambda x, tensor_parallel_output_grad, group: right(x, group=group),
    )


def parts_of_gradients_left_apart(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    for parameter in dit.parameters():
        parameter.sequence_parallel = False


def text_seen_by_a_half_of_the_tokens(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    """As where lengths of the part between the matrices are taken for those inside."""
    right = dit_layer.TextCoreAttention.forward

    def forward(self: object, query: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        out_SBD = right(self, query, *rest)
        return torch.cat([out_SBD.chunk(2)[0], torch.zeros_like(out_SBD.chunk(2)[1])])

    patch.setattr(dit_layer.TextCoreAttention, "forward", forward)


def stages_left_apart(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    dit.config.has_cond_embedder = False


def copies_counted_once_a_stage(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    for parameter in dit.parameters():
        parameter.shared = False


def shards_cut_with_other_parameters(dit: VideoDiT, patch: pytest.MonkeyPatch) -> None:
    for parameter in dit.parameters():
        parameter.shared_embedding = False


TP2 = layout(tp=2, sequence_parallel=True)
Mistake = tuple[Parallel, Callable[[VideoDiT, pytest.MonkeyPatch], None]]
OF_TWO_RANKS: list[Mistake] = [
    (TP2, gradients_of_copies_added),
    (TP2, parts_of_gradients_left_apart),
    (TP2, text_seen_by_a_half_of_the_tokens),
    (layout(pp=2), stages_left_apart),
    (layout(pp=2), copies_counted_once_a_stage),
]
OF_FOUR_RANKS: list[Mistake] = [
    (layout(pp=2, distributed_optimizer=True), shards_cut_with_other_parameters)
]


def mistakes_are_told(rank: int, path: Path, mistakes: list[Mistake]) -> None:
    one_rank = torch.load(path, weights_only=False)
    for parallel, make_wrong in mistakes:
        with pytest.MonkeyPatch.context() as patch:
            ours = run_video_steps(
                parallel, model=MODEL, num_steps=2, change=partial(make_wrong, patch=patch)
            )
        assert differences(ours, one_rank), make_wrong.__name__


@pytest.mark.parametrize(("num_ranks", "mistakes"), [(2, OF_TWO_RANKS), (4, OF_FOUR_RANKS)])
def test_each_known_mistake_of_a_layout_would_be_told(
    one_rank: Path, num_ranks: int, mistakes: list[Mistake]
) -> None:
    run_ranks(mistakes_are_told, num_ranks, one_rank, mistakes)
