"""Clips and pictures of coloured shapes with captions that say what they do; made, not downloaded.

``FOLDER/clips`` gets real mp4 (H.264) and webm (VP9) files of 64 x 64 pixels, ``FOLDER/pictures``
png files; ``captions.jsonl`` in each names them. Seeded: clip ``n`` is the same in every call.

    python -m data_tools.make_video_demo --folder data/demo_video
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from megatron_curr.data.keyed import uniforms

Frames = NDArray[np.uint8]  # [F, H, W, 3]

SIZE = 64
NUM_FRAMES = 32
FPS = 16
COLOURS = {
    "red": (230, 50, 40),
    "green": (50, 200, 70),
    "blue": (60, 90, 240),
    "yellow": (240, 210, 50),
}
SHAPES = ("square", "circle", "bar")
# Direction (x, y) of a shape that moves; the others change where they are.
MOVES = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
}
MOTIONS = (*MOVES, "grows", "shrinks", "rotates")
BACKGROUND = (24, 24, 28)
NUM_KINDS = len(MOTIONS) * len(COLOURS) * len(SHAPES)  # scenes until captions repeat
# What writes which file; the pixel format is what players expect.
ENCODINGS = {".mp4": ("libx264", {"crf": "16"}), ".webm": ("libvpx-vp9", {"crf": "20", "b": "0"})}
WEBM_EVERY = 4


@dataclass(frozen=True, slots=True)
class Scene:
    """One shape and what it does. ``radius`` is a share of the frame."""

    colour: str
    shape: str
    motion: str
    radius: float
    crossing: float  # where it stands on the axis it does not move along, from -1 to 1
    drop: float  # how far down it stands in a picture, from -1 to 1

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion}".strip()


def scene(number: int, *, seed: int = 7, moving: bool = True) -> Scene:
    """The ``number``-th scene: colours, shapes and motions take turns, the rest is drawn."""
    turn = number
    turn, motion = divmod(turn, len(MOTIONS)) if moving else (turn, 0)
    turn, colour = divmod(turn, len(COLOURS))
    draws = uniforms(seed, "scene", np.array([number]), 3)[0]
    shape = "bar" if MOTIONS[motion] == "rotates" and moving else SHAPES[turn % len(SHAPES)]
    return Scene(
        tuple(COLOURS)[colour],
        shape,
        MOTIONS[motion] if moving else "",
        0.16 + 0.06 * draws[0],
        0.8 * draws[1] - 0.4,
        2 * draws[2] - 1,
    )


def draw(scene: Scene, *, size: int = SIZE, num_frames: int = NUM_FRAMES) -> Frames:
    """The frames of a scene, [num_frames, size, size, 3], edges smoothed over a pixel."""
    done = np.linspace(0, 1, num_frames)[:, None, None] if num_frames > 1 else np.full((1, 1, 1), 0)
    grid = (np.arange(size) + 0.5) / size
    radius = np.full_like(done, scene.radius, float)
    reach = 0.5 - scene.radius - 0.02  # how far the centre may go from the middle
    x = y = 0.5 + np.zeros_like(done)
    angle = np.zeros_like(done)
    if scene.motion in MOVES:
        right, down = MOVES[scene.motion]
        along, across = reach * (2 * done - 1), reach * scene.crossing
        x = 0.5 + (right * along if right else across)
        y = 0.5 + (down * along if down else across)
    elif scene.motion == "grows":
        radius = 0.08 + 0.3 * done
    elif scene.motion == "shrinks":
        radius = 0.38 - 0.3 * done
    elif scene.motion == "rotates":
        radius = radius * 1.7
        angle = 0.25 * done
    else:
        x = x + reach * scene.crossing
        y = y + reach * scene.drop
    cos, sin = np.cos(2 * np.pi * angle), np.sin(2 * np.pi * angle)
    over_x, over_y = grid[None, None, :] - x, grid[None, :, None] - y
    turned_x, turned_y = cos * over_x + sin * over_y, cos * over_y - sin * over_x
    if scene.shape == "circle":
        outside = np.hypot(turned_x, turned_y) - radius
    else:
        half = radius * (0.35 if scene.shape == "bar" else 0.9)
        outside = np.maximum(np.abs(turned_x) - radius, np.abs(turned_y) - half)
    cover = np.clip(0.5 - outside * size, 0, 1)[..., None]
    colour, ground = np.array(COLOURS[scene.colour]), np.array(BACKGROUND)
    return np.rint(ground + cover * (colour - ground)).astype(np.uint8)


def write_video(path: Path, frames: Frames, *, fps: int = FPS) -> None:
    """Encode as ``path``'s ending says."""
    codec, options = ENCODINGS[path.suffix]
    # Else a webm file gets a random identity, and with it another hash, in every call.
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=Fraction(fps), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_video_demo(folder: Path, *, num_clips: int, num_pictures: int) -> dict[str, Path]:
    """Write clips and pictures with their captions; the folder of each."""
    from PIL import Image

    folders = {"clips": folder / "clips", "pictures": folder / "pictures"}
    for place in folders.values():
        place.mkdir(parents=True, exist_ok=True)
    captions = []
    for number in range(num_clips):
        clip = scene(number)
        suffix = ".webm" if number % WEBM_EVERY == 0 else ".mp4"
        path = folders["clips"] / f"{number:05d}{suffix}"
        write_video(path, draw(clip))
        captions.append({"file": path.name, "caption": clip.caption})
    _write_captions(folders["clips"], captions)
    captions = []
    for number in range(num_pictures):
        picture = scene(number, moving=False)
        path = folders["pictures"] / f"{number:05d}.png"
        Image.fromarray(draw(picture, num_frames=1)[0]).save(path)
        captions.append({"file": path.name, "caption": picture.caption})
    _write_captions(folders["pictures"], captions)
    return folders


def _write_captions(folder: Path, captions: list[dict[str, str]]) -> None:
    lines = [json.dumps(caption) + "\n" for caption in captions]
    (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    import typer

    def _main(
        folder: Path = Path("data/demo_video"), clips: int = 672, pictures: int = 240
    ) -> None:
        """Write the video demo's clips and pictures into a folder."""
        for name, place in make_video_demo(folder, num_clips=clips, num_pictures=pictures).items():
            typer.echo(f"{name}: {place}")

    typer.run(_main)
