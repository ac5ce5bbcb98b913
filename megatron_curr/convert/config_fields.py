"""Every field of a ``config.json``: read, or known not to matter, or refused by its name.

What a config leaves out is what transformers' own class of the architecture gives it, so an absent
field never becomes our default. A field of that class which no table lists, as a later version of
transformers may bring, is refused as soon as it is not the class's default.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

from megatron_curr.convert.family import Family
from megatron_curr.convert.rotations import FIELDS as ROTATIONS
from megatron_curr.convert.rotations import as_version_4, settle_rotations
from megatron_curr.convert.windows import FULL, SLIDING
from megatron_curr.errors import CheckpointError

READ_FOR_ALL = frozenset({"vocab_size", "tie_word_embeddings", "initializer_range"}) | ROTATIONS
"""Fields that ``hf_config.py`` reads for every family."""
_TRAINING = "drops values while training; pretraining here does without"
_OUTPUT = "says what is returned beside the logits"
HARMLESS = {
    "transformers_version": "names what wrote the file",
    "architectures": "chooses the family",
    "dtype": "the weight files say it",
    "torch_dtype": "the weight files say it",
    "use_cache": "keeps keys and values between calls",
    "bos_token_id": "belongs to the tokenizer; carried along",
    "eos_token_id": "belongs to the tokenizer; carried along",
    "pad_token_id": "the row of padding is a row as any other",
    "output_hidden_states": _OUTPUT,
    "output_router_logits": _OUTPUT,
    "return_dict": _OUTPUT,
    "chunk_size_feed_forward": "computes the same in parts",
    "is_encoder_decoder": "no decoder-only class reads it",
    "is_decoder": "no decoder-only class reads it",
    "id2label": "of classifiers",
    "label2id": "of classifiers",
    "problem_type": "of classifiers",
    "classifier_dropout": "of classifiers",
    **dict.fromkeys(
        (
            *("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop"),
            *("residual_dropout", "embedding_dropout"),
        ),
        _TRAINING,
    ),
    "router_aux_loss_coef": "weighs a loss; not what the model computes",
    "pretraining_tp": "computes the same in parts",
}
"""Fields that change no logit of any family, and why."""
# Attributes that transformers reads off any config, whatever class it is of.
_PLAIN = {"is_causal": (True, None), "per_layer_config": (None, {}), "fusion_config": (None, {})}
# Words in fields that are about positions: such a one, unknown to the class, is never passed over.
_OF_ROTATIONS = ("rope", "rotary", "yarn", "ntk", "alibi")


def class_fields(family: Family) -> dict[str, Any]:
    """Fields of transformers' config class of the family with their defaults; of ours if none."""
    kind = _config_class(family.model_type)
    if kind is None:
        return dict(family.defaults)
    return {
        name: parameter.default
        for name, parameter in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def _config_class(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # takes seconds

    # Its `get` looks where nothing is.
    return CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401


def settle(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The config with every field that its class has, and the rotations under ``rope``.

    Raises ``CheckpointError`` for what transformers itself refuses, and for a field that changes
    the result and that nothing here reads.
    """
    told, alike = config.get("model_type"), (family.model_type, *family.also_of_type)
    if told and told not in alike and _config_class(told) is not None:
        raise CheckpointError(
            f"config.json: model_type is {told!r} and the architecture {family.architecture}, of "
            f"type {family.model_type!r}; transformers goes by the first: make them agree"
        )
    kind = _config_class(told if told in alike else family.model_type)
    fields = class_fields(family)
    taken = _as_transformers_takes_it(config, family, kind=kind, fields=fields)
    settled = {**config, **taken}
    for name, values in _PLAIN.items():
        if config.get(name, values[0]) not in values:
            raise CheckpointError(
                f"config.json: {name} is {config[name]!r}; {family.architecture} converts without"
            )
    listed = {*READ_FOR_ALL, *HARMLESS, *family.fields}
    for name, default in fields.items():
        if name not in listed and taken[name] not in (default, None):
            raise CheckpointError(
                f"config.json: {name} is {taken[name]!r}, a field of {family.architecture} that is "
                f"not converted; with transformers' default, {default!r}, it is"
            )
    for name, value in config.items():
        unknown = name not in listed and name not in fields
        if unknown and value not in (None, False) and any(word in name for word in _OF_ROTATIONS):
            raise CheckpointError(
                f"config.json: {name} is {value!r}; no {family.architecture} of transformers "
                "reads it: remove it if it is there by mistake"
            )
    apart = family.windows_rotate_apart
    settled["rope"] = settle_rotations(config, stretched=taken, layers=FULL if apart else None)
    if apart:
        settled["rope_of_windows"] = settle_rotations(config, stretched=taken, layers=SLIDING)
    return settled


def _as_transformers_takes_it(
    config: Mapping[str, Any], family: Family, *, kind: Any, fields: dict[str, Any]
) -> dict[str, Any]:
    if kind is None:
        return fields | {name: config[name] for name in {*fields, *ROTATIONS} if name in config}
    from transformers.utils import logging

    given = copy.deepcopy(dict(config))
    if "rope_parameters" in given and "rope_parameters" not in fields:  # version 4 passes it over
        given |= as_version_4(given.pop("rope_parameters") or {}, given)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it tells of fields that are refused here
    try:
        settled = kind.from_dict(given)
        return {name: getattr(settled, name) for name in fields if hasattr(settled, name)}
    except Exception as error:  # whatever it is that the class makes of a wrong value
        zero = [name for name in family.names if config.get(name) == 0]
        told = f"{zero[0]} is 0" if zero else str(error).strip().replace("\n", " ")
        raise CheckpointError(
            f"config.json: {family.architecture} of transformers refuses it: {told}"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
