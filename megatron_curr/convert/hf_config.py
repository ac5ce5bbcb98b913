"""``config.json``: which family it is of, which ``Model``; and the way back.

Transformers 5 writes ``rope_parameters`` and ``dtype``; 4 reads ``rope_theta``, ``rope_scaling``
and ``torch_dtype``, and falls back to a theta of 10,000 without a word. Both are written, and read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_curr.convert import (
    cohere,
    deepseek_v2,
    deepseek_v3,
    falcon,
    gemma,
    glm4,
    glm4_moe,
    gpt_neox,
    granite,
    llama,
    mistral,
    mixtral,
    nemotron,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
    starcoder2,
    telechat2,
)
from megatron_curr.convert.config_fields import settle
from megatron_curr.convert.family import Family
from megatron_curr.convert.refused import REFUSED
from megatron_curr.convert.rotations import of_every_kind
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.expert_rules import expert_combinations
from megatron_curr.recipe.model import Model
from megatron_curr.recipe.model_rules import combinations

FAMILIES: tuple[Family, ...] = (
    *(llama.FAMILY, qwen2.FAMILY, qwen3.FAMILY, mistral.FAMILY, olmo2.FAMILY, olmo3.FAMILY),
    *(phi3.FAMILY, granite.FAMILY, smollm3.FAMILY, glm4.GLM, glm4.FAMILY),
    *(gemma.GEMMA, gemma.GEMMA3, cohere.FAMILY, cohere.COHERE2),
    *(gpt_neox.FAMILY, falcon.FAMILY, starcoder2.FAMILY, nemotron.FAMILY, telechat2.FAMILY),
    *(mixtral.FAMILY, qwen3_moe.FAMILY, deepseek_v3.FAMILY, deepseek_v2.FAMILY, glm4_moe.FAMILY),
)
# Of the rotations, what version 4 of transformers has beside ``rope_scaling``.
_BESIDE = ("rope_theta", "partial_rotary_factor")


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises ``CheckpointError`` for an architecture that is not known, or cannot be exact."""
    named = (config.get("architectures") or ["none"])[0]
    for family in FAMILIES:
        if named in (family.architecture, *family.also_known_as):
            return family
    reason = (
        f"cannot be represented exactly: {REFUSED[named]}" if named in REFUSED else "is unknown"
    )
    raise CheckpointError(
        f"config.json: the architecture {named} {reason}; these convert: "
        + ", ".join(family.architecture for family in FAMILIES)
    )


def choose_family(model: Model, *, architecture: str | None = None) -> Family:
    """The architecture that is this model exactly: the one named, or the first.

    Raises ``RecipeError`` that says, for every family, what stands against it.
    """
    reasons = []
    for family in FAMILIES:
        if architecture not in (None, family.architecture, family.model_type):
            continue
        reason = family.misfit(model)
        if reason is None:
            return family
        reasons.append(f"{family.architecture}: {reason}")
    if not reasons:
        raise RecipeError(
            f"--architecture {architecture!r}: is unknown; use one of "
            + ", ".join(family.architecture for family in FAMILIES)
        )
    raise RecipeError(
        "no Hugging Face architecture known here is exactly this model:\n  " + "\n  ".join(reasons)
    )


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as transformers' class of its architecture takes it (``config_fields.py``).

    Raises ``CheckpointError`` when there is none, or a field stands against conversion.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json; give a model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is no mapping")
    if config.get("quantization_config") is not None:
        raise CheckpointError(f"{path}: the weights are quantised; dequantise them to bf16 first")
    return settle(config, family_of(config))


def model_of(config: Mapping[str, Any], family: Family) -> Model:
    """The architecture a ``config.json`` of this family describes.

    Raises ``CheckpointError`` for what the family's table does not cover.
    """
    model = _model_of(config, family)
    asked = {ours: published for published, ours in family.names.items()}
    for problem in (*combinations(model), *expert_combinations(model)):
        setting = str(problem.path[-1])
        raise CheckpointError(
            f"config.json: {asked.get(setting, setting)} is not converted: model.{setting} "
            f"{problem.message}"
        )
    return model


def _model_of(config: Mapping[str, Any], family: Family) -> Model:
    try:
        vocab_size = config["vocab_size"]
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise CheckpointError(f"config.json: vocab_size is {vocab_size!r}, which is no count")
        return Model(
            **{
                "vocab_size": vocab_size,
                # As it is published: rows that only pad enter the softmax.
                "make_vocab_size_divisible_by": min(vocab_size & -vocab_size, 128),
                "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
                "init_method_std": float(config.get("initializer_range") or 0.02),
                **family.settings(config),
            }
        )
    except KeyError as missing:
        raise CheckpointError(f"config.json: {missing} is missing") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise CheckpointError(f"config.json: {field}: {first['msg']}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json: a value is of another kind ({error})") from error


def write_config(
    model: Model,
    family: Family,
    *,
    vocab_size: int,
    token_ids: Mapping[str, int | None],
    dtype: str,
) -> dict[str, Any]:
    """The text of ``config.json``, for transformers 4 and 5."""
    rope = family.rotations(model)
    stretched = {key: value for key, value in rope.items() if key not in _BESIDE}
    beside = {key: rope[key] for key in _BESIDE if key in rope}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": vocab_size,
        **family.config(model),
        "initializer_range": model.init_method_std,
        **beside,
        "rope_scaling": stretched if stretched["rope_type"] != "default" else None,
        "rope_parameters": (of_every_kind(model, rope) if family.windows_rotate_apart else rope),
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        "pad_token_id": None,  # some classes have a default beyond our vocabulary
        **token_ids,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
