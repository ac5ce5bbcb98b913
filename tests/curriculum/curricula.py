"""Random curricula for property tests: valid recipes of every shape."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from megatron_curr.recipe.phases import Curriculum

SOURCES = ("prose", "code", "math")
LENGTHS = (8, 16, 32)


@st.composite
def weights(draw: st.DrawFn) -> dict[str, float]:
    """Shares of every source, down to one in a million or none; never all zero."""
    share = st.one_of(st.just(0.0), st.floats(1e-6, 1.0))
    table = {name: draw(share) for name in SOURCES}
    table[draw(st.sampled_from(SOURCES))] = draw(st.floats(0.1, 1.0))
    return table


@st.composite
def phases(draw: st.DrawFn, number: int, *, max_samples: int = 400) -> dict[str, Any]:
    """One phase as it stands in a recipe; a later one may leave its curves out or ramp them."""
    seq_length = draw(st.sampled_from(LENGTHS))
    shape = st.sampled_from(["linear", "cosine", "step"])
    first = number == 0
    phase: dict[str, Any] = {
        "name": f"phase{number}",
        "tokens": draw(st.integers(seq_length, max_samples * seq_length)),
        "seq_length": seq_length,
    }
    kind = draw(st.sampled_from(["flat", "ramp"] if first else ["held", "flat", "ramp"]))
    start = {"from": draw(weights())} if first else {}
    if kind == "flat":
        phase["mixture"] = draw(weights())
    elif kind == "ramp":
        phase["mixture"] = {**start, "to": draw(weights()), "shape": draw(shape)}
    batch = 32 * draw(st.integers(1, 6))
    if first or draw(st.booleans()):
        phase["global_batch_tokens"] = batch
    elif draw(st.booleans()):
        phase["global_batch_tokens"] = {
            "from": batch,
            "to": batch + 32 * draw(st.integers(0, 6)),
            "increment": 32,
            "shape": draw(shape),
        }
    if first:
        phase["learning_rate"] = {"from": 0.0, "to": 1e-3, "over": phase["tokens"]}
    elif draw(st.booleans()):
        phase["learning_rate"] = {"to": 1e-4, "shape": draw(shape)}
    return phase


@st.composite
def curricula(draw: st.DrawFn, *, max_phases: int = 4, max_samples: int = 400) -> Curriculum:
    """One to ``max_phases`` phases with ramps, held curves and changes of length."""
    count = draw(st.integers(1, max_phases))
    table = [draw(phases(number, max_samples=max_samples)) for number in range(count)]
    return Curriculum.model_validate({"phases": table})
