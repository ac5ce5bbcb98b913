"""Random video recipes for property tests: sources, shapes, phases with and without ramps."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from megatron_curr.recipe.video_schema import VideoRecipe

BUCKETS = {"image": (32, 32, 1), "clip": (32, 32, 24), "wide": (32, 64, 40)}
SOURCES = {"a": ("image", "clip"), "b": ("clip", "wide"), "c": ("wide",)}
MODEL = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "text_hidden_size": 12}


def video_recipe(
    phases: list[dict[str, Any]],
    *,
    batch_samples: dict[str, int] | None = None,
    seed: int = 5,
    **source: Any,
) -> VideoRecipe:
    """A recipe of these phases over ``SOURCES``."""
    lots = {"image": 12, "clip": 6, "wide": 4} | (batch_samples or {})
    return VideoRecipe.model_validate(
        {
            "name": "drawn",
            "seed": seed,
            "model": MODEL,
            "data": {
                "buckets": {
                    name: {
                        "height": height,
                        "width": width,
                        "num_frames": frames,
                        "batch_samples": lots[name],
                    }
                    for name, (height, width, frames) in BUCKETS.items()
                },
                "sources": {
                    name: {"shards": name, "buckets": list(buckets), "max_epochs": 1e6, **source}
                    for name, buckets in SOURCES.items()
                },
            },
            "curriculum": {"phases": phases},
            "parallel": {"micro_batch_tokens": 64},
            "checkpoint": {"every_tokens": 1000},
            "evaluation": {"every_tokens": 1000},
        }
    )


@st.composite
def shares(draw: st.DrawFn, names: tuple[str, ...]) -> dict[str, float]:
    """A weight for each name, all above 0."""
    return {name: draw(st.floats(0.05, 1.0)) for name in names}


@st.composite
def video_recipes(draw: st.DrawFn, *, max_phases: int = 3) -> VideoRecipe:
    """One to three phases; weights flat, held or ramped, batches from the largest lot on."""
    phases = []
    for number in range(draw(st.integers(1, max_phases))):
        phase: dict[str, Any] = {
            "name": f"phase{number}",
            "tokens": draw(st.integers(500, 3000)),
            "global_batch_tokens": draw(st.integers(160, 700)),
        }
        for curve, names in (("mixture", tuple(SOURCES)), ("buckets", tuple(BUCKETS))):
            kind = draw(st.sampled_from(["flat", "ramp"] if number == 0 else ["held", "ramp"]))
            if kind == "flat":
                phase[curve] = draw(shares(names))
            elif kind == "ramp":
                start = {"from": draw(shares(names))} if number == 0 else {}
                shape = draw(st.sampled_from(["linear", "cosine", "step"]))
                phase[curve] = {**start, "to": draw(shares(names)), "shape": shape}
        if number == 0:
            phase["learning_rate"] = 1e-3
        phases.append(phase)
    return video_recipe(phases, seed=draw(st.integers(0, 99)))
