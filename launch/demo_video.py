"""The demo's video twin: clips, shards, training in three phases, sampled clips, report."""

from __future__ import annotations

import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from data_tools.make_video_demo import FPS, NUM_KINDS, make_video_demo, scene
from data_tools.preprocess_video import preprocess_video
from data_tools.seen_motion import seen_colour, seen_motion
from data_tools.video_clips import ClipOptions, buckets_of_recipe
from launch.demo import Demo, DemoFailed, tell_what_was_read
from launch.local import launch_training
from megatron_curr.data.video_shards import open_video_shards
from megatron_curr.errors import DataError
from megatron_curr.recipe.shipped import shipped_recipe
from megatron_curr.report import write_report
from megatron_curr.training.run_folder import RunFolder
from megatron_curr.units import format_bytes, format_duration

RECIPE = "demo_video.yaml"
SOURCE = "shapes"
NUM_CLIPS, NUM_PICTURES = 504, 240
HELDOUT_FRAC = 0.06
RANKS = 2
STEPS, GUIDANCE = 20, 3.0
EVERY_SCENE = 6  # of 84: two of each motion, in all colours and shapes


@dataclass
class VideoDemo(Demo):
    """Where the video demo works."""

    num_steps: int = 5

    @property
    def data(self) -> Path:
        """Clips, pictures and shards."""
        return self.folder / "data" / "demo_video"

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "runs" / "demo_video"

    @property
    def shards(self) -> Path:
        """The source's two sides."""
        return self.data / SOURCE

    @property
    def overrides(self) -> list[str]:
        """The recipe's paths, moved into the demo's folder."""
        source = f"data.sources.{SOURCE}"
        return [
            f"run_folder={self.run}",
            f"{source}.shards={self.shards / 'train'}",
            f"{source}.heldout={self.shards / 'heldout'}",
        ]


def run_video_demo(
    folder: Path = Path("."), *, num_clips: int = NUM_CLIPS, num_pictures: int = NUM_PICTURES
) -> int:
    """Run every step in ``folder``; the exit code, 0 when all of them held, 1 when one did not.

    Raises a ``UserError`` that names the step.
    """
    # Two spinning threads crawl as soon as anything else wants one of two cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    demo = VideoDemo(folder)
    began_s = time.monotonic()
    recipe_path = shipped_recipe(RECIPE)
    try:
        with demo.telling("clips and pictures of shapes that move, as mp4, webm and png"):
            make_clips(demo, num_clips=num_clips, num_pictures=num_pictures)
        with demo.telling("encode them: wavelet latents, text features, shards"):
            encode(demo, recipe_path)
        with demo.telling(f"train on {RANKS} ranks: pictures, small clips, large clips"):
            train(demo, recipe_path)
            tell_what_was_read(demo)
        with demo.telling("sample a clip of each motion"):
            sheet = sample_clips(demo)
        with demo.telling("one page about the run"):
            page = write_report(demo.run)
            demo.say(f"{page} ({format_bytes(page.stat().st_size)})")
    except DemoFailed as error:
        demo.console.print(f"[bold red]failed:[/] {escape(str(error))}", soft_wrap=True)
        return 1
    sample = f"megatron-curr sample {shlex.quote(str(demo.run))}"
    demo.console.print(
        f"\n[bold green]done[/] in {format_duration(time.monotonic() - began_s)}.  Look at:\n"
        f"  {sheet}   what the model draws\n"
        f"  {page}   in a browser\n"
        f"  {recipe_path}   the recipe\n"
        f'  {sample} --prompt "a blue circle moves up"   more of it',
        soft_wrap=True,
    )
    return 0


def make_clips(demo: VideoDemo, *, num_clips: int, num_pictures: int) -> None:
    """Real files, unless they are there."""
    if (demo.data / "pictures" / "captions.jsonl").is_file():  # written last
        demo.say(f"{demo.data} is there already and left as it is")
        return
    folders = make_video_demo(demo.data, num_clips=num_clips, num_pictures=num_pictures)
    for name, count in (("clips", num_clips), ("pictures", num_pictures)):
        size = sum(file.stat().st_size for file in folders[name].iterdir())
        demo.say(f"{count} {name}, {format_bytes(size)} in {folders[name]}")


def encode(demo: VideoDemo, recipe_path: Path) -> None:
    """Shards of the recipe's buckets, unless they are there and whole."""
    try:
        sides = [open_video_shards(demo.shards / side) for side in ("train", "heldout")]
        demo.say(f"{demo.shards} is there already and left as it is")
    except DataError:
        preprocess_video(
            [demo.data / "clips", demo.data / "pictures"],
            demo.shards,
            buckets=buckets_of_recipe(recipe_path, SOURCE),
            options=ClipOptions(fps=FPS, heldout_frac=HELDOUT_FRAC),
            workers=2,
            overwrite=demo.shards.exists(),
        )
        sides = [open_video_shards(demo.shards / side) for side in ("train", "heldout")]
    table = Table(box=None, padding=(0, 2, 0, 2))
    for column in ("bucket", "training samples", "held out"):
        table.add_column(column, justify="left" if column == "bucket" else "right")
    for bucket in sides[0].bucket_names:
        table.add_row(bucket, *(f"{len(side.clips_of(bucket)):,}" for side in sides))
    demo.console.print(table)


def train(demo: VideoDemo, recipe_path: Path) -> None:
    """Train to the end, from where the run stands."""
    if RunFolder(demo.run).newest_state() is not None:
        demo.say(f"{demo.run} is there already and goes on from its newest checkpoint")
    demo.say(f"[dim]$ megatron-curr train {shlex.quote(str(recipe_path))} --ranks {RANKS}[/]")
    code = launch_training(recipe_path, demo.overrides, RANKS)
    if code:
        raise DemoFailed(f"training ended with exit code {code}; see {demo.run / 'logs'}")


def sample_clips(demo: VideoDemo) -> Path:
    """Clips of captions it was trained on, and how many show what they say; the contact sheet."""
    from megatron_curr.sample.run import sample
    from megatron_curr.sample.wish import Wish

    captions = [scene(number).caption for number in range(0, NUM_KINDS, EVERY_SCENE)]
    wish = Wish(tuple(captions), num_steps=STEPS, guidance=GUIDANCE, batch=len(captions))
    done = sample(demo.run, demo.run / "samples", wish)
    moving = sum(
        seen_motion(frames) in caption
        for frames, caption in zip(done.frames, captions, strict=True)
    )
    coloured = sum(
        seen_colour(frames) in caption
        for frames, caption in zip(done.frames, captions, strict=True)
    )
    demo.say(
        f"{len(captions)} clips with the {done.weights} weights: [bold]{moving}[/] move as their "
        f"captions say, [bold]{coloured}[/] have its colour; {done.sheet}"
    )
    return done.sheet
