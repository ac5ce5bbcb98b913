"""The reference pages, made from what the code itself goes by: recipes, presets, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from megatron_curr.recipe.kinds import recipe_json_schema
from megatron_curr.recipe.presets import TEXT_PRESETS, VIDEO_PRESETS, model_preset, preset_names
from megatron_curr.training.metrics import METRICS

_ROOTS = {"Recipe": "A text recipe", "VideoRecipe": "A video recipe"}
_SCALARS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
    "object": "section",
}
_BOUNDS = {"exclusiveMinimum": "> {}", "minimum": ">= {}", "exclusiveMaximum": "< {}",
           "maximum": "<= {}"}  # fmt: skip
_MADE = "<!-- Made by `make reference`; a test compares it. Edit the descriptions in the code. -->"


def recipe_page() -> str:
    """Every key of a recipe, with its type, default and meaning, in Markdown."""
    schemas = recipe_json_schema()["$defs"]
    lines = [
        "# Recipe reference",
        "",
        _MADE,
        "",
        "Every key of a recipe, from the models that read it. The model says which kind a recipe "
        "is: one with a preset or a key that only a video model has is of video. `megatron-curr "
        "schema` gives the same to an editor, and `megatron-curr check` says what is wrong.",
        "",
        "* A **count** is `4096`, `1_000`, `400k`, `2.5M`, `100B` or `1.5T`: powers of 1,000.",
        "* A **length** is `4096`, or `4k`, the same: powers of 1,024, as models are named.",
        "* A curve is one value for its phase, or pieces, one after the other. Left out, it holds "
        "the value that the phase before ended on.",
        "* `--set section.key=value` overrides a key; an item of a list goes by number or name: "
        "`--set curriculum.phases.anneal.tokens=2B`.",
    ]
    seen: set[str] = set()
    for root, title in _ROOTS.items():
        lines += ["", f"## {title}", "", schemas[root]["description"]]
        for name in _reached(root, schemas):
            if name not in seen:
                seen.add(name)
                lines += _section(name, schemas[name])
    return "\n".join([*lines, "", *_presets()]) + "\n"


def metrics_page() -> str:
    """Every metric and its unit, in Markdown."""
    lines = [
        "# Metrics",
        "",
        _MADE,
        "",
        "What `metrics.jsonl`, TensorBoard and Weights & Biases call what they hold. A row is one "
        "JSON object: `step`, `consumed_tokens`, `time_s` (Unix time), `phase`, then values. "
        "`<source>` stands for a source of the recipe, `<bucket>` for one of its shapes.",
        "",
        "| metric | what it is |",
        "|---|---|",
        *(f"| `{name}` | {_cell(meaning)} |" for name, meaning in METRICS.items()),
    ]
    return "\n".join(lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {"recipe": recipe_page, "metrics": metrics_page}


def _reached(name: str, schemas: dict[str, Any]) -> list[str]:
    """The sections that one leads to, itself first, each once and in the order of its keys."""
    found = dict.fromkeys([name])
    for schema in schemas[name]["properties"].values():
        for child in _references(schema):
            found |= dict.fromkeys(_reached(child, schemas))
    return list(found)


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for child in schema.values():
            yield from _references(child)
    elif isinstance(schema, list):
        for child in schema:
            yield from _references(child)


def _section(name: str, schema: dict[str, Any]) -> Iterator[str]:
    if name not in _ROOTS:
        yield from ("", f"### {name}", "", _cell(schema["description"].split("\n\n")[0]))
    yield from ("", "| key | type | default | meaning |", "|---|---|---|---|")
    required = set(schema.get("required", ()))
    of_preset = {key for form in schema.get("anyOf", ()) for key in form["required"]} - {"preset"}
    for key, field in schema["properties"].items():
        default = "required" if key in required else "the preset's" if key in of_preset else ""
        if not default and ("$ref" in field or field.get("default") is not None):
            default = _default(field)
        yield f"| `{key}` | {_type(field)} | {default} | {_cell(field['description'])} |"


def _default(field: dict[str, Any]) -> str:
    if "$ref" in field:
        return "its own defaults"
    value = field["default"]
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _type(schema: dict[str, Any]) -> str:
    """In a few words, what may be written."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if str(schema.get("title", "")).startswith(("A count", "A length")):
        return schema["title"].split(":")[0].removeprefix("A ").removesuffix(" in tokens")
    forms = schema.get("anyOf") or schema.get("oneOf")
    if forms:
        kinds = (_type(form) for form in forms if form.get("type") != "null")
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema and len(schema["enum"]) > 8:
        return "[name](#presets)"
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    inner = [schema.get("additionalProperties"), *schema.get("patternProperties", {}).values()]
    if named := [form for form in inner if isinstance(form, dict)]:
        return f"{_type(named[0])} by name"
    bounds = [text.format(schema[key]) for key, text in _BOUNDS.items() if key in schema]
    return " ".join([_SCALARS[schema["type"]], *bounds])


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|").replace("<", "\\<")


def _presets() -> Iterator[str]:
    yield from ("## Presets", "")
    yield "`model: {preset: NAME}` is an architecture; a key beside it replaces one of its own."
    yield from (
        "",
        "| text preset | layers | width | heads | KV heads | experts | vocabulary | length |",
    )
    yield "|---|---:|---:|---:|---:|---:|---:|---:|"
    for name in preset_names(TEXT_PRESETS):
        model = model_preset(name, TEXT_PRESETS)
        heads = model["num_attention_heads"]
        cells = (
            f"`{name}`",
            model["num_layers"],
            model["hidden_size"],
            heads,
            "latent" if "kv_lora_rank" in model else model.get("num_query_groups", heads),
            model.get("num_moe_experts", ""),
            model.get("vocab_size", "the tokenizer's"),
            f"{model['max_position_embeddings']:,}",
        )
        yield f"| {' | '.join(map(str, cells))} |"
    yield from ("", "| video preset | layers | width | heads |", "|---|---:|---:|---:|")
    for name in preset_names(VIDEO_PRESETS):
        model = model_preset(name, VIDEO_PRESETS)
        sizes = (model[key] for key in ("num_layers", "hidden_size", "num_attention_heads"))
        yield f"| `{name}` | {' | '.join(map(str, sizes))} |"
