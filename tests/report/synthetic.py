"""Run folders written the way training writes them, without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from megatron_curr.curriculum.ledger import append_entries, open_ledger
from megatron_curr.curriculum.schedule import build_schedule
from megatron_curr.recipe.load import dump_recipe, load_recipe
from megatron_curr.recipe.schema import Recipe

DEMO_RECIPE = Path(__file__).parents[2] / "configs" / "demo_text.yaml"
START_S = 1_780_000_000.0


def write_run(
    folder: Path,
    *,
    recipe: Recipe | None = None,
    until_tokens: int | None = None,
    restart_at_tokens: int | None = None,
    torn_last_line: bool = False,
) -> Path:
    """A run folder whose losses fall for the sources that the mixture feeds."""
    recipe = recipe or load_recipe(DEMO_RECIPE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    append_entries(folder / "ledger.jsonl", open_ledger(recipe.curriculum))
    rows = _Rows(recipe)
    rows.start(num_ranks=2)
    end_tokens = min(until_tokens or rows.schedule.total_tokens, rows.schedule.total_tokens)
    next_evaluation, next_save = 0, recipe.checkpoint.every_tokens
    while rows.clock < end_tokens:
        if rows.clock >= next_evaluation:
            rows.evaluate()
            next_evaluation += recipe.evaluation.every_tokens
        if rows.clock >= next_save:
            rows.add(**{"checkpoint/blocked_s": 0.3, "checkpoint/size_bytes": 37_000_000})
            next_save += recipe.checkpoint.every_tokens
        if restart_at_tokens is not None and rows.clock >= restart_at_tokens:
            rows.start(num_ranks=1)
            restart_at_tokens = None
        rows.train()
    rows.evaluate()
    text = "\n".join(rows.lines) + "\n"
    (folder / "metrics.jsonl").write_text(text + ('{"step": 9, "cons' if torn_last_line else ""))
    return folder


class _Rows:
    """The metrics of a run that is being made up."""

    def __init__(self, recipe: Recipe) -> None:
        self.schedule = build_schedule(recipe.curriculum)
        self.lines: list[str] = []
        self.clock = self.step = 0
        self._phase = self.schedule.at(0).phase
        self._now_s = START_S
        self._chance = random.Random(7)
        self._consumed = dict.fromkeys(recipe.data.sources, 0.0)

    def add(self, **values: object) -> None:
        base = {"step": self.step, "consumed_tokens": self.clock, "time_s": self._now_s}
        self.lines.append(json.dumps({**base, "phase": self._phase, **values}))

    def start(self, *, num_ranks: int) -> None:
        self.add(**{"run/num_ranks": num_ranks, "run/dp_size": 1, "run/tp_size": num_ranks})

    def evaluate(self) -> None:
        losses = {f"eval/{name}/loss_nats_per_token": self._loss(name) for name in self._consumed}
        self.add(**{"eval/time_s": 0.8, **losses})

    def train(self) -> None:
        chance, plan = self._chance, self.schedule.at(self.clock)
        step_time_s = plan.step_tokens * 3.1e-4 * chance.lognormvariate(0, 0.05)
        step_time_s += 1.5 if self.step == 0 else 0.0
        for name, weight in self.schedule.weights_at(self.clock).items():
            self._consumed[name] += weight * plan.step_tokens + chance.uniform(-1, 1)
        self.step, self.clock = self.step + 1, plan.next_consumed_tokens
        self._now_s, self._phase = self._now_s + step_time_s, plan.phase
        norm = 0.5 + 3 * math.exp(-self.clock / 50_000) * chance.lognormvariate(0, 0.2)
        losses = {name: self._loss(name) + chance.gauss(0, 0.15) for name in self._consumed}
        values: dict[str, object] = {
            "train/loss_nats_per_token": sum(losses.values()) / len(losses),
            "train/grad_norm": norm,
            "train/learning_rate": plan.learning_rate,
            "train/weight_decay": plan.weight_decay,
            "train/global_batch_tokens": plan.step_tokens,
            "train/seq_length_tokens": plan.seq_length,
            "train/nonfinite_steps": 0,
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_s": plan.step_tokens / step_time_s,
            "perf/data_wait_s": 0.001,
        }
        for name, consumed_tokens in self._consumed.items():
            if consumed_tokens > 1:
                values[f"train/{name}/loss_nats_per_token"] = losses[name]
            values[f"data/{name}/consumed_tokens"] = round(consumed_tokens)
            values[f"data/{name}/epochs"] = consumed_tokens / 400_000
        self.add(**values)

    def _loss(self, source: str) -> float:
        fed = math.exp(-self._consumed[source] / 60_000)
        return 3.2 + 5.8 * fed + self._chance.gauss(0, 0.02)


def many_sources(num_sources: int) -> Recipe:
    """The demo recipe with so many sources of falling weight in one mixture."""
    values = load_recipe(DEMO_RECIPE).model_dump(by_alias=True)
    names = [f"source_number_{index:02d}" for index in range(num_sources)]
    weights = {name: 1.0 / (index + 1) for index, name in enumerate(names)}
    turned = dict(zip(names, reversed(weights.values()), strict=True))
    mixtures = (weights, {"to": turned}, turned)
    for phase, mixture in zip(values["curriculum"]["phases"], mixtures, strict=True):
        phase["mixture"] = mixture
    values["data"]["sources"] = dict.fromkeys(names, values["data"]["sources"]["prose"])
    return Recipe.model_validate(values)
