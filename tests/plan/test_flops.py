"""Arithmetic in closed form, against published shapes, torch's counter and counting by hand."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_curr.plan.dit import dit_parameters
from megatron_curr.plan.flops import keys_in_documents, model_flops_per_token
from megatron_curr.plan.video_flops import sample_flops
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.video_model import VideoDiT
from tests.plan.allocations import NUM_SAMPLES, build_chunks, fake_ranks, forward
from tests.plan.test_memory import EXPERTS, QWEN, setting


def test_flops_of_llama3_8b() -> None:
    model = Model.model_validate({"preset": "llama3_8b"})
    flops = model_flops_per_token(model, vocab_size=128_256, seq_length=8_192)
    matrices = 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128_256
    assert flops == 6 * matrices + 12 * 32 * 4096 * 8193 / 2


def test_flops_of_mixtral_count_two_of_eight_experts() -> None:
    model = Model.model_validate({"preset": "mixtral_8x7b"})
    flops = model_flops_per_token(model, vocab_size=32_000, seq_length=4_096, keys_per_token=4_096)
    attention, expert, router = 2 * 4096**2 + 2 * 4096 * 1024, 3 * 4096 * 14336, 4096 * 8
    matrices = 32 * (attention + 2 * expert + router) + 4096 * 32_000
    assert flops == 6 * matrices + 12 * 32 * 4096 * 4096


def test_flops_of_llama3_70b_are_those_that_megatron_bridge_reports() -> None:
    # Its table gives 1,619 tokens/s and 727 TFLOP/s for a GPU: 449.0 GFLOP a token.
    model = Model.model_validate({"preset": "llama3_70b"})
    flops = model_flops_per_token(model, vocab_size=128_256, seq_length=8_192)
    assert flops == pytest.approx(727e12 / 1619, rel=1e-3)


@pytest.mark.parametrize("name", ["dense", "tied", "experts"])
def test_flops_are_those_that_torch_counts(name: str) -> None:
    changes = {"dense": {}, "tied": QWEN, "experts": {**EXPERTS, "moe_router_topk": 2}}
    wide = {"hidden_size": 128, "ffn_hidden_size": 320, "num_layers": 3}
    where = setting(model={**wide, **changes[name]})
    # Attention is written out for the counter, which does not know the CPU's fused kernel; so
    # every score counts, masked or not.
    with fake_ranks(where) as groups, sdpa_kernel(SDPBackend.MATH):
        (chunk,) = build_chunks(where, groups)
        with FlopCounterMode(display=False) as counter:
            forward(where, chunk, groups).sum().backward()
    per_token = model_flops_per_token(
        where.model,
        vocab_size=where.vocab_size,
        seq_length=where.seq_length,
        keys_per_token=where.seq_length,
    )
    counted = counter.get_total_flops() / (NUM_SAMPLES * where.seq_length)
    assert counted == pytest.approx(per_token, rel=0.01)


def keys_by_hand(lengths: list[int], seq_length: int) -> float:
    """Mean over tokens, and over every place that a window may have begun at."""
    seen = [
        min(place, begun) + 1
        for length in lengths
        for place, begun in product(range(length), range(seq_length))
    ]
    return sum(seen) / len(seen)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 10))
def test_keys_inside_documents_are_counted_by_hand(lengths: list[int], seq_length: int) -> None:
    counted = keys_in_documents(np.array(lengths), seq_length)
    assert counted == pytest.approx(keys_by_hand(lengths, seq_length))


def test_one_endless_document_is_a_causal_mask() -> None:
    assert keys_in_documents(np.array([10**9]), 4096) == pytest.approx(4097 / 2, rel=1e-4)


def test_video_model_has_the_published_parameters() -> None:
    assert dit_parameters(VideoDiT.model_validate({"preset": "dit_10b"})) == 10_830_321_984


@pytest.mark.parametrize(
    ("latent_shape", "tokens", "published"),
    [
        ((1, 64, 64), 1_024, 6.3e13),
        ((14, 44, 80), 12_320, 1.06e15),
        ((14, 60, 106), 22_260, 2.42e15),
        ((10, 90, 160), 36_000, 5.06e15),
        ((14, 90, 160), 50_400, 8.77e15),
    ],
)
def test_video_flops_by_shape(
    latent_shape: tuple[int, int, int], tokens: int, published: float
) -> None:
    model = VideoDiT.model_validate({"preset": "dit_10b"})
    assert model.num_patches(latent_shape) == tokens
    flops = sample_flops(model, num_patches=tokens, text_tokens=300)
    assert flops == pytest.approx(published, rel=0.01)
