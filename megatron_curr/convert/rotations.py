"""Rotary positions of a ``config.json`` as settings of ``Model``, and the way back.

megatron-core rotates plainly, by linear interpolation, as Llama 3.1 does, or by YaRN; its rotations
in latent attention are plain or YaRN's. Every other kind, and every field that the kind does not
have, is refused by name: a rotation that is a little off shows in no shape and hardly in a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_curr.convert.windows import FULL, SLIDING
from megatron_curr.errors import CheckpointError, RecipeError
from megatron_curr.recipe.model import Model

DENSE = frozenset({"linear", "llama3", "yarn"})
"""Kinds of stretched rotations that plain attention has here."""
FIELDS = frozenset(
    {
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        *("rotary_pct", "rotary_emb_base", "original_max_position_embeddings"),
    }
)
"""Fields of a config, of version 4 or 5 of transformers, that are read here."""
SETTINGS = frozenset(
    {
        *("rotary_base", "rotary_percent", "rope_scaling_factor", "seq_len_interpolation_factor"),
        *("yarn_scaling_factor", "yarn_original_max_position_embeddings", "yarn_beta_fast"),
        *("yarn_beta_slow", "yarn_mscale", "yarn_mscale_all_dim"),
    }
)
"""Settings of ``Model`` that are read and written here."""
_OF_EVERY_KIND = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_NO_EFFECT = {"finetuned"}  # of early YaRN models; nothing reads it
_OF_KIND = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {
        *("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    },
    "yarn": {
        *("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale"),
        *("mscale_all_dim", "attention_factor", "truncate"),
    },
}
_LLAMA_3_1 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_WHY_NOT = {
    "dynamic": "it changes with the length of the text; up to max_position_embeddings tokens it is "
    "plain: to train on no more, remove it",
    "longrope": "it has a factor for every frequency, one set for short and one for long texts",
}


def settle_rotations(
    config: Mapping[str, Any], *, stretched: Mapping[str, Any], layers: str | None = None
) -> dict[str, Any]:
    """The one mapping of rotations that a config means: ``rope_type``, ``rope_theta``, the rest.

    ``stretched`` is what transformers makes of the config: ``rope_parameters`` in version 5,
    ``rope_theta`` and ``rope_scaling`` in 4. With ``layers``, those of this kind of layers. Raises
    ``CheckpointError`` where the places a config may name them differ, or, without, layers do.
    """
    _refuse_contradictions(config, layers=layers)
    rope = stretched.get("rope_parameters") or config.get("rope_parameters")
    if not rope:
        theta = stretched.get("rope_theta") or config.get("rotary_emb_base") or 10_000.0
        percent = stretched.get("rotary_pct", stretched.get("partial_rotary_factor"))
        rope = {"rope_theta": theta, **(stretched.get("rope_scaling") or {})}
        rope = rope if percent is None else {"partial_rotary_factor": percent, **rope}
        if layers == SLIDING:  # in version 4 these are never stretched
            rope = {"rope_theta": stretched.get("rope_local_base_freq") or theta}
    elif layers == SLIDING and not rope.get(SLIDING):
        rope = {"rope_theta": stretched.get("rope_local_base_freq") or rope.get("rope_theta")}
    rope = _of_layers(rope, layers, layer_types=stretched.get("layer_types"))
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rest = {key: value for key, value in rope.items() if key != "type" and value is not None}
    return {**rest, "rope_type": kind, "rope_theta": float(rope.get("rope_theta") or 10_000.0)}


def as_version_4(rope: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` as the fields that version 4 of transformers has for them."""
    rope = _of_layers(rope, FULL if FULL in rope else None)
    beside = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    stretched = {name: value for name, value in rope.items() if name not in beside}
    if config.get("rope_scaling") or _bare(rope) == {"rope_type": "default"}:
        return beside
    return {**beside, "rope_scaling": stretched}


def _of_layers(
    rope: Mapping[str, Any], layers: str | None, *, layer_types: Sequence[str] | None = None
) -> Mapping[str, Any]:
    """The rotations of this kind of layers, where a config gives each kind its own.

    Of all kinds, if these agree.
    """
    if layers is not None and isinstance(rope.get(layers), Mapping):
        chosen: Mapping[str, Any] = rope[layers]
        return chosen
    used = {name: of for name, of in rope.items() if isinstance(of, Mapping)}
    if layer_types:
        used = {name: of for name, of in used.items() if name in layer_types} or used
    if not used:
        return rope
    if len({repr(sorted(of.items())) for of in used.values()}) > 1:
        raise CheckpointError(
            f"config.json: rope_parameters differ from layer to layer ({used}); megatron-core "
            "rotates every layer alike"
        )
    return next(iter(used.values()))


def _refuse_contradictions(config: Mapping[str, Any], *, layers: str | None) -> None:
    new, old = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    new = _of_layers(new, layers, layer_types=config.get("layer_types"))
    if layers == SLIDING:
        theta, local = new.get("rope_theta"), config.get("rope_local_base_freq")
        if theta is not None and local is not None and theta != local:
            raise CheckpointError(
                f"config.json: rope_local_base_freq is {local} and rope_parameters.{SLIDING} has "
                f"{theta}; readers disagree which of the two counts: make them equal"
            )
        return
    for name, field in (
        ("rope_theta", "rope_theta"),
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "partial_rotary_factor"),
        ("partial_rotary_factor", "rotary_pct"),
        ("original_max_position_embeddings", "original_max_position_embeddings"),
    ):
        inside, beside = new.get(name, old.get(name)), config.get(field)
        if inside is not None and beside is not None and inside != beside:
            raise CheckpointError(
                f"config.json: {field} is {beside} and rope_parameters.{name} {inside}; readers "
                "disagree which of the two counts: make them equal"
            )
    if new and old and _bare(new) != _bare(old):
        raise CheckpointError(
            f"config.json: rope_scaling is {old} and rope_parameters {new}; versions 4 and 5 of "
            "transformers read one each: make them equal"
        )


def _bare(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    named = {k: v for k, v in rope.items() if k not in _OF_EVERY_KIND and v is not None}
    return {**named, "rope_type": kind}


def read_rotations(
    rope: Mapping[str, Any], *, kinds: frozenset[str], is_partial: bool, max_positions: int
) -> dict[str, Any]:
    """Settings of ``Model`` from what ``settle_rotations`` gave.

    ``kinds`` are those the architecture has here beside the plain one, and ``is_partial`` says
    whether it may leave a part of a head as it is. Raises ``CheckpointError`` that names the field
    megatron-core has not.
    """
    kind = rope["rope_type"]
    if kind != "default" and kind not in kinds:
        known = ", ".join(map(repr, sorted(kinds))) or "none"
        why = f": {_WHY_NOT[kind]}" if kind in _WHY_NOT else ""
        raise CheckpointError(
            f"config.json: rope_type {kind!r} is not converted for this architecture{why} "
            f"(beside plain rotations: {known})"
        )
    for key, value in rope.items():
        if key not in _OF_EVERY_KIND | _OF_KIND[kind] | _NO_EFFECT:
            raise CheckpointError(
                f"config.json: {key} {value!r} of the rotations is no field of rope_type {kind!r}; "
                "remove it if it is there by mistake"
            )
    settings: dict[str, Any] = {"rotary_base": rope["rope_theta"]}
    percent = rope.get("partial_rotary_factor", 1.0)
    if is_partial:
        settings["rotary_percent"] = float(percent)
        if kind == "yarn" and percent != 1.0:
            raise CheckpointError(
                f"config.json: partial_rotary_factor is {percent} and rope_type 'yarn'; "
                "megatron-core's YaRN rotates whole heads"
            )
    elif percent != 1.0:
        raise CheckpointError(
            f"config.json: partial_rotary_factor is {percent}; this architecture rotates whole "
            "heads: remove it if it is there by mistake"
        )
    if kind == "default":
        return settings
    if (factor := rope.get("factor")) is None and kind == "yarn":
        factor = max_positions / rope["original_max_position_embeddings"]
    if factor is None or float(factor) < 1:
        raise CheckpointError(f"config.json: factor {factor} of the rotations must be 1 or more")
    if float(factor) == 1:
        return settings
    return {**settings, **_READ[kind](rope, float(factor))}


def read_window_rotations(config: Mapping[str, Any]) -> dict[str, Any]:
    """The base of layers with a window, where they do not rotate as the others do."""
    rope, others = config["rope_of_windows"], config["rope"]
    layers = set(config["layer_types"])
    if SLIDING not in layers or rope == others:
        return {}
    if rope["rope_type"] != "default":
        raise CheckpointError(
            f"config.json: rope_type {rope['rope_type']!r} of {SLIDING}; layers with a window "
            "rotate plainly here"
        )
    # With no layer to tell apart, the others' rotations are nobody's.
    return {"window_rotary_base": rope["rope_theta"]}


def of_every_kind(model: Model, rope: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of a config that names them for every kind of layers."""
    apart = {"rope_type": "default", "rope_theta": model.window_rotary_base}
    return {FULL: rope, SLIDING: apart if model.window_rotary_base else rope}


def _read_linear(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    return {"seq_len_interpolation_factor": factor}


def _read_llama3(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    for name, value in _LLAMA_3_1.items():
        if rope.get(name) != value:
            raise CheckpointError(
                f"config.json: {name} of the rotations is {rope.get(name)}; megatron-core has "
                f"Llama 3.1's alone: {_LLAMA_3_1}"
            )
    return {"rope_scaling_factor": factor}


def _read_yarn(rope: Mapping[str, Any], factor: float) -> dict[str, Any]:
    if not rope.get("truncate", True):
        raise CheckpointError(
            "config.json: truncate of the rotations is False; megatron-core's YaRN rounds the "
            "range it stretches"
        )
    over_all, given = rope.get("mscale_all_dim") or 0.0, rope.get("mscale")
    mscale = float(given) if given and over_all else 1.0
    wanted = rope.get("attention_factor")
    if wanted is None and over_all and not given:
        wanted = _concentration(factor, 1.0)
    if wanted is not None:  # what transformers multiplies with; ours follows from two settings
        slope = 0.1 * math.log(factor)
        mscale = (float(wanted) * _concentration(factor, over_all) - 1) / slope
        if math.isclose(mscale, 1.0, rel_tol=1e-9):  # the default, written out
            mscale = 1.0
        if mscale < 0:
            raise CheckpointError(
                f"config.json: attention_factor {wanted} of the rotations is less than "
                "megatron-core's YaRN can have"
            )
    return {
        "yarn_scaling_factor": factor,
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": float(rope.get("beta_fast") or 32),
        "yarn_beta_slow": float(rope.get("beta_slow") or 1),
        "yarn_mscale": mscale,
        "yarn_mscale_all_dim": float(over_all),
    }


_READ = {"linear": _read_linear, "llama3": _read_llama3, "yarn": _read_yarn}


def _concentration(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def write_rotations(model: Model, *, kinds: frozenset[str], is_partial: bool) -> dict[str, Any]:
    """Inverse of ``read_rotations``. Raises ``RecipeError`` for what the architecture has not."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rotary_base}
    if is_partial:
        rope["partial_rotary_factor"] = model.rotary_percent
    elif model.rotary_percent != 1.0:
        raise RecipeError(f"rotary_percent is {model.rotary_percent}, there 1.0")
    setting = None
    if (factor := model.seq_len_interpolation_factor) is not None:
        setting = "seq_len_interpolation_factor"
        rope |= {"rope_type": "linear", "factor": factor}
    elif (factor := model.rope_scaling_factor) is not None:
        setting = "rope_scaling_factor"
        rope |= {"rope_type": "llama3", "factor": factor, **_LLAMA_3_1}
    elif (factor := model.yarn_scaling_factor) is not None:
        setting = "yarn_scaling_factor"
        rope |= _write_yarn(model, factor)
    if setting is not None and rope["rope_type"] not in kinds:
        raise RecipeError(f"{setting} is {factor}, there None")
    return rope


def _write_yarn(model: Model, factor: float) -> dict[str, Any]:
    rope = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": model.yarn_original_max_position_embeddings,
        "beta_fast": model.yarn_beta_fast,
        "beta_slow": model.yarn_beta_slow,
    }
    mscale, over_all = model.yarn_mscale, model.yarn_mscale_all_dim
    if mscale and over_all:
        return {**rope, "mscale": mscale, "mscale_all_dim": over_all}
    if over_all:
        rope["mscale_all_dim"] = over_all
    if (mscale, over_all) != (1.0, 0.0):
        # transformers asks for both of the two, or for what follows from them.
        factors = (_concentration(factor, of) for of in (mscale, over_all))
        rope["attention_factor"] = next(factors) / next(factors)
    return rope
