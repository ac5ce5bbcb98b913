"""The demo: corpus, training on two ranks, resume on one, export, proof, report; told as it goes.

Every step that is done already is left alone and said to be, so that a demo that was interrupted
goes on where it stood.
"""

from __future__ import annotations

import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from data_tools.make_demo import SOURCES, build_demo_data
from launch.local import launch_training
from megatron_curr.curriculum.schedule import build_schedule
from megatron_curr.data.manifest import read_manifest
from megatron_curr.data.shards import open_shards
from megatron_curr.data.tokenizer import load_tokenizer
from megatron_curr.errors import CheckpointError, DataError, UserError
from megatron_curr.recipe.load import load_recipe
from megatron_curr.recipe.schema import Recipe
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.report import write_report
from megatron_curr.report.records import read_run
from megatron_curr.trace_verify import verify_run
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.units import format_bytes, format_count, format_duration

RECIPE = "demo_text.yaml"
RAMP_PHASE = "mixed"
ONE_RANK = ("parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false")
PROMPTS = (
    "The following options are",
    "def read_lines(self, path):\n",
    "Question: ",
)
NEW_TOKENS = 40
NUM_STEPS = 6


class DemoFailed(RuntimeError):
    """A step did not do what it should; the message says which and how to look into it."""


@dataclass
class Demo:
    """Where the demo works, and how it talks."""

    folder: Path
    console: Console = field(default_factory=lambda: Console(highlight=False))
    step: int = 0
    num_steps: int = NUM_STEPS

    @property
    def data(self) -> Path:
        """Corpus, tokenizer and shards."""
        return self.folder / "data" / "demo"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / "demo_text"

    @property
    def overrides(self) -> list[str]:
        """The recipe's paths, moved into the demo's folder."""
        places = [
            f"data.sources.{source}.{split}={self.data / 'shards' / source / part}"
            for source in SOURCES
            for split, part in (("shards", "train"), ("heldout", "heldout"))
        ]
        tokenizer = f"data.tokenizer={self.data / 'tokenizer.model'}"
        return [f"run_folder={self.run}", tokenizer, *places]

    def say(self, text: str) -> None:
        """One line under the heading of the step."""
        self.console.print(f"  {text}", soft_wrap=True)

    @contextmanager
    def telling(self, title: str) -> Iterator[None]:
        """A numbered step; an error that leaves it says which it was."""
        self.step += 1
        place = f"step {self.step} of {self.num_steps}"
        self.console.print(f"\n[bold cyan]{place}[/]  [bold]{title}[/]")
        began_s = time.monotonic()
        try:
            yield
        except UserError as error:
            raise type(error)(f"demo, {place} ({title}): {error}") from error
        except DemoFailed as error:
            raise DemoFailed(f"demo, {place} ({title}): {error}") from error
        except Exception as error:
            error.add_note(f"in the demo, {place} ({title})")
            raise
        self.console.print(f"  [dim]{format_duration(time.monotonic() - began_s)}[/]")


def run_demo(folder: Path = Path(".")) -> int:
    """Run every step in ``folder``; the exit code, 0 when all of them held, 1 when one did not.

    Raises a ``UserError`` that names the step.
    """
    # Two spinning threads crawl as soon as anything else wants one of two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    demo = Demo(folder)
    try:
        _run_steps(demo)
    except DemoFailed as error:
        demo.console.print(f"[bold red]failed:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    return 0


def _run_steps(demo: Demo) -> None:
    began_s = time.monotonic()
    recipe_path = shipped_recipe(RECIPE)
    recipe = load_recipe(recipe_path, demo.overrides)
    with demo.telling("a corpus from Python's own library, a tokenizer, shards"):
        make_data(demo)
    with demo.telling("train on two ranks, stop in the middle of the ramp"):
        stop_at_tokens = middle_of_ramp(recipe)
        train(demo, recipe_path, ranks=2, stop_at_tokens=stop_at_tokens)
    with demo.telling("resume on one rank, to the end"):
        train(demo, recipe_path, ranks=1)
        tell_losses(demo)
        tell_what_was_read(demo)
    with demo.telling("write a Hugging Face folder"):
        export(demo)
    with demo.telling("load it with transformers: the same model?"):
        compare(demo)
        generate(demo)
    with demo.telling("one page about the run"):
        page = write_report(demo.run)
        demo.say(f"{page} ({format_bytes(page.stat().st_size)})")
    trace = f"megatron-curr trace {shlex.quote(str(demo.run))} --token 300k --text"
    demo.console.print(
        f"\n[bold green]done[/] in {format_duration(time.monotonic() - began_s)}.  Look at:\n"
        f"  {page}   in a browser\n"
        f"  {demo.run / 'hf' / 'README.md'}   the model card\n"
        f"  {recipe_path}   the recipe\n"
        f"  {trace}   what the model read there",
        soft_wrap=True,
    )


def make_data(demo: Demo) -> None:
    """Corpus, tokenizer and shards, unless they are there and whole."""
    if not data_is_whole(demo.data):
        build_demo_data(demo.data)
    else:
        demo.say(f"{demo.data} is there already and left as it is")
    table = Table(box=None, padding=(0, 2, 0, 2))
    for column in ("source", "training tokens", "held-out tokens"):
        table.add_column(column, justify="left" if column == "source" else "right", style="default")
    for source in SOURCES:
        train_set, heldout_set = (
            open_shards(demo.data / "shards" / source / part) for part in ("train", "heldout")
        )
        table.add_row(source, f"{train_set.num_tokens:,}", f"{heldout_set.num_tokens:,}")
    demo.console.print(table)


def data_is_whole(folder: Path) -> bool:
    """Whether every shard opens and was made with the tokenizer that is there."""
    try:
        tokenizer = load_tokenizer(folder / "tokenizer.model")
        for source in SOURCES:
            for part in ("train", "heldout"):
                shards = folder / "shards" / source / part
                open_shards(shards)
                manifest = read_manifest(shards)
                record = manifest.tokenizer if manifest else None
                if record is None or record.sha256 != tokenizer.sha256:
                    return False
    except DataError:
        return False
    return True


def middle_of_ramp(recipe: Recipe) -> int:
    """The token half way through the phase whose mixture ramps."""
    phases = recipe.curriculum.phases
    index = next(index for index, phase in enumerate(phases) if phase.name == RAMP_PHASE)
    return sum(phase.tokens for phase in phases[:index]) + phases[index].tokens // 2


def train(demo: Demo, recipe_path: Path, *, ranks: int, stop_at_tokens: int | None = None) -> None:
    """Train to ``stop_at_tokens`` or the end, unless the run is there already."""
    recipe = load_recipe(recipe_path, demo.overrides)
    goal_tokens = stop_at_tokens or recipe_total(demo, recipe)
    state = RunFolder(demo.run).newest_state()
    if state is not None and state.consumed_tokens >= goal_tokens:
        demo.say(f"{demo.run} is at token {state.consumed_tokens:,} already")
        return
    layout = ONE_RANK if ranks == 1 else ()
    words = ["megatron-curr", "train", str(recipe_path), "--ranks", str(ranks)]
    for override in layout:
        words += ["--set", override]
    if stop_at_tokens is not None:
        words += ["--stop-at", str(stop_at_tokens)]
    demo.say(f"[dim]$ {shlex.join(words)}[/]")
    code = launch_training(
        recipe_path, [*demo.overrides, *layout], ranks, stop_at_tokens=stop_at_tokens
    )
    if code:
        raise DemoFailed(f"training ended with exit code {code}; see {demo.run / 'logs'}")


def recipe_total(demo: Demo, recipe: Recipe) -> int:
    """Tokens of the whole run, as the schedule rounds them to whole steps."""
    if (demo.run / "recipe.yaml").is_file():
        return read_run(demo.run).schedule.total_tokens
    return build_schedule(recipe.curriculum).total_tokens


def tell_losses(demo: Demo) -> None:
    """Held-out loss at the start, when the ramp begins, and at the end: math waits for its turn."""
    run = read_run(demo.run)
    ramp = next(phase for phase in run.phases if phase.name == RAMP_PHASE)
    rows = run.evaluations.rows
    before = [row for row in rows if row["consumed_tokens"] <= ramp.start_tokens]
    if not before:
        raise CheckpointError(f"{demo.run}: metrics.jsonl has no evaluation; remove the run")
    table = Table(box=None, padding=(0, 2, 0, 2))
    table.add_column("held-out loss, nats/token")
    for title in ("at first", f"before {RAMP_PHASE!r}", "at the end"):
        table.add_column(title, justify="right")
    for source in run.sources:
        values = [
            row[f"eval/{source}/loss_nats_per_token"] for row in (rows[0], before[-1], rows[-1])
        ]
        table.add_row(source, *(f"{value:.3f}" for value in values))
    demo.console.print(table)


def tell_what_was_read(demo: Demo) -> None:
    """Every step's samples, against the ledger. Raises ``DemoFailed`` where one differs."""
    verdict = verify_run(demo.run)
    demo.say(verdict.as_text())
    if not verdict.agrees:
        raise DemoFailed(f"see megatron-curr trace {demo.run} --verify")


def export(demo: Demo) -> None:
    """Write ``hf/`` anew from the newest checkpoint."""
    from megatron_curr.convert.run_conversion import run_conversion

    target = demo.run / "hf"
    if (target / "config.json").is_file():
        demo.say(f"{target} is there from before and is written anew")
        shutil.rmtree(target)
    done = run_conversion(demo.run, target, verify=False)
    demo.say(
        f"{target}: {done.architecture}, {format_count(done.num_parameters)} parameters, "
        f"{format_bytes(done.size_bytes)}; the tokenizer gives the same ids"
    )


def compare(demo: Demo) -> None:
    """The same held-out tokens through both models. Raises ``DemoFailed`` when they differ."""
    from megatron_curr.convert.source import open_source
    from megatron_curr.convert.verify import compare as compare_models

    source = open_source(demo.run)
    found = compare_models(demo.run / "hf", source.path, source)
    demo.say(
        f"{found.num_tokens:,} held-out tokens through both models: largest logit difference "
        f"[bold]{found.largest_logit_difference:.1e}[/] (mean {found.mean_logit_difference:.1e}, "
        f"tolerance {found.tolerance:g}), same next token {found.same_next_token_frac:.2%}"
    )
    if not found.is_close:
        raise DemoFailed(f"the models differ by more than {found.tolerance:g}")


def generate(demo: Demo) -> None:
    """Continue a few prompts, seeded."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = demo.run / "hf"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    torch.manual_seed(7)
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=20)
        text = tokenizer.decode(ids[0][inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        shown = f"[bold]{escape(prompt)}[/]{escape(text)}".replace("\n", "\n  [dim]│[/] ")
        demo.say(f"[dim]│[/] {shown}\n")
